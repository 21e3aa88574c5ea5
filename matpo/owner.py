"""The process that started this one and keeps it alive (`matpo.keeper`), at the other end of standard input: beats tell
it that this process goes on, and when it is gone this process ends in order instead of living on unseen."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from typing import Final, Self

import anyio

OWNED: Final = "--owned"
"""Given to every kept command; without it standard input is left alone."""
BEAT_S: Final = 1.0
LEAVE_LIMIT_S: Final = 90.0
"""Seconds for an orderly end after the owner is gone; then the process kills itself."""


class Owner:
    """The link to the owner; without one, every call does nothing.

    From the start on a thread beats: the process runs, whatever it loads or computes. The first call of `beat` takes
    over from it: from then on it is the caller's loop that must go on. The owner kills a process that falls silent.
    """

    def __init__(self, link: socket.socket | None, *, leave_limit_s: float = LEAVE_LIMIT_S) -> None:
        self._link = link
        self._leave_limit_s = leave_limit_s
        self._beaten_at = 0.0
        self._taken_over = threading.Event()
        if link is not None:
            threading.Thread(target=self._outlive, args=(link,), name="owner", daemon=True).start()
            threading.Thread(target=self._beat_from_a_thread, args=(link,), name="beats", daemon=True).start()

    @classmethod
    def at_standard_input(cls, *, owned: bool, leave_limit_s: float = LEAVE_LIMIT_S) -> Self:
        """Take the link from standard input, which reads as empty afterwards."""
        if not owned:
            return cls(None)
        link = socket.socket(fileno=os.dup(0))
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        return cls(link, leave_limit_s=leave_limit_s)

    def beat(self) -> None:
        """Say that the caller's loop goes on."""
        self._taken_over.set()
        now = time.monotonic()
        if self._link is None or now - self._beaten_at < BEAT_S:
            return
        self._beaten_at = now
        _send_beat(self._link)

    async def beat_forever(self) -> None:
        """For an event loop: it beats as long as its tasks get their turns."""
        while True:
            self.beat()
            await anyio.sleep(BEAT_S)

    def _beat_from_a_thread(self, link: socket.socket) -> None:
        while True:
            _send_beat(link)
            if self._taken_over.wait(BEAT_S):
                return

    def _outlive(self, link: socket.socket) -> None:
        """The owner never writes, so an answer means that it is gone."""
        with suppress(ConnectionError):  # the same
            link.recv(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(self._leave_limit_s)
        os.kill(os.getpid(), signal.SIGKILL)


def _send_beat(link: socket.socket) -> None:
    try:
        link.send(b".", socket.MSG_DONTWAIT)
    except (BlockingIOError, ConnectionError):
        return  # the owner stands still, or is gone


UNOWNED: Final = Owner(None)
"""Of a process that nobody keeps."""


def add_owned(parser: argparse.ArgumentParser) -> None:
    """The option by which a keeper says that it is at standard input."""
    parser.add_argument(OWNED, action="store_true", help=argparse.SUPPRESS)
