"""Ends what an actor that was killed leaves behind: a tool server ought to end when its input does, but one that is
frozen, or waits for something else, would stay for good.

As a program, one for each process that starts servers: lines `+ID` and `-ID` at standard input tell it of process
groups, and the end of its input that nobody looks after them any more.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from functools import cache
from typing import Final

GRACE_S: Final = 5.0
"""For servers to end by themselves."""
LOOK_EVERY_S: Final = 0.1


class Heir:
    """The other end, in the process whose servers they are. Never waits: an heir that stands still is of no use."""

    def __init__(self) -> None:
        read, self._told = os.pipe()
        os.set_blocking(self._told, False)
        nothing = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
        # A group of its own: what signals the actor's is not meant for it.
        words = [sys.executable, "-I", "-S", __file__]
        os.posix_spawn(
            words[0], words, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, read, 0), *nothing], setpgroup=0
        )
        os.close(read)

    def gains(self, group: int) -> None:
        """A server was started."""
        self._tell(f"+{group}\n")

    def loses(self, group: int) -> None:
        """Nothing is left of it."""
        self._tell(f"-{group}\n")

    def _tell(self, line: str) -> None:
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(self._told, line.encode())


@cache
def heir() -> Heir:
    """That of this process."""
    return Heir()


def main() -> None:
    groups = set[int]()
    for line in sys.stdin:
        (groups.add if line.startswith("+") else groups.discard)(int(line[1:]))
    give_up_s = time.monotonic() + GRACE_S
    while groups and time.monotonic() < give_up_s:
        time.sleep(LOOK_EVERY_S)
        groups = {group for group in groups if signalled(group, 0)}
    for group in groups:
        signalled(group, signal.SIGKILL)


def signalled(group: int, number: int) -> bool:
    """Whether there was somebody to signal; 0 only looks."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


if __name__ == "__main__":
    main()
