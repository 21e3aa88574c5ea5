"""Keeps a command alive: started again with growing pauses when it dies, named and killed when it falls silent.

The command gets one end of a socket as its standard input (`matpo.owner`): it beats there, and its end tells it that
the keeper is gone.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import anyio
import structlog
from anyio.abc import Process

from matpo.errors import PAUSED, USER_ERROR, Paused, UserError
from matpo.owner import OWNED

log: structlog.stdlib.BoundLogger = structlog.get_logger()

HEALTHY_S: Final = 600.0
"""A process that died by itself after so long starts its backoff afresh …"""
KILLED_HEALTHY_S: Final = 10.0
"""… one that was killed from outside after so long: it is not to blame."""
MOST_FAILURES: Final = 10
"""In a row; then it is no accident."""
GRACE_S: Final = 2.0

Command = Callable[[], Awaitable[Sequence[str]]]
"""Awaited before every start, for what may have changed; an empty one is not wanted any more."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for what."""

    pauses_s: tuple[float, ...] = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
    """Before the first, second, … restart in a row."""
    most_failures: int = MOST_FAILURES
    """In a row; then it is given up."""
    first_s: float = 120.0
    """For the first beat: imports from a cold disk take long. It is named after a third of it, then killed."""
    silent_s: float = 15.0
    """Without a beat; then it is named."""
    frozen_s: float = 45.0
    """Without a beat; then it is killed and started again."""


class Kept:
    """One command to keep alive; used in a `with`, at whose end it is killed if it still lives."""

    def __init__(
        self,
        name: str,
        command: Command,
        *,
        output: Path,
        environment: Mapping[str, str],
        patience: Patience | None = None,
        outlived_by: Sequence[Kept] = (),
    ) -> None:
        """What the command prints is appended to `output`. The commands in `outlived_by` take this one's end, not only
        the keeper's, for the end of their owner: without a keeper they end after it."""
        self.name = name
        self.command = command
        self._output = output
        self.environment = dict(environment)
        self._patience = patience or Patience()
        self._link, self._theirs = socket.socketpair()
        self._link.setblocking(False)
        self._inherited = [other._link.fileno() for other in outlived_by]
        self._process: Process | None = None
        self._code: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._link.close()
        self._theirs.close()

    async def keep(self, stopping: anyio.Event) -> int:
        """Until it ends with 0, or ends once `stopping` is set; returns the exit code.

        Raises `UserError` with its own words when it paused, has something to fix or always dies.
        """
        failures = 0
        while True:
            command = await self.command()
            if not command or stopping.is_set():
                return 0
            began = time.monotonic()
            code = await self._once(command, stopping)
            if code == 0 or stopping.is_set():
                return code
            if code == PAUSED:
                raise Paused(self.last_words())
            if code == USER_ERROR:
                raise UserError(f"{self.name} could not go on: {self.last_words()}")
            healthy_s = HEALTHY_S if code > 0 else KILLED_HEALTHY_S
            failures = 1 if time.monotonic() - began > healthy_s else failures + 1
            if failures >= self._patience.most_failures:
                raise UserError(f"{self.name} died {failures} times in a row: {self.last_words()}; see {self._output}")
            pause_s = self._patience.pauses_s[min(failures, len(self._patience.pauses_s)) - 1]
            log.warning("restarting", child=self.name, code=code, failures=failures, pause_s=pause_s)
            with anyio.move_on_after(pause_s):
                await stopping.wait()

    async def once(self, stopping: anyio.Event) -> int:
        """Start it and wait for its end, whatever that is; returns the exit code."""
        return await self._once(await self.command(), stopping)

    async def wait(self) -> None:
        """Until the process of now has ended."""
        if self._process is not None:
            await self._process.wait()

    async def end(self, limit_s: float) -> int | None:
        """Tell it to finish what it does and leave; when it has not after `limit_s`, it is killed.

        Returns the exit code of the last process there was, None if there was none.
        """
        process = self._process
        if process is None:
            return self._code
        self.signal(signal.SIGTERM)
        with anyio.move_on_after(limit_s):
            return await process.wait()
        self.kill()
        return -signal.SIGKILL

    def signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            try:
                self._process.send_signal(number)
            except ProcessLookupError:
                return  # it ended by itself

    def kill(self) -> None:
        """End it and what it started in its session, at once."""
        if self._process is not None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)  # it leads a session of its own
            except ProcessLookupError:
                return

    def last_words(self) -> str:
        """The last line it printed: its one-line error, if it had one to give."""
        if not self._output.is_file():
            return "it printed nothing"
        lines = self._output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1].removeprefix("error: ") if lines else "it printed nothing"

    async def _once(self, command: Sequence[str], stopping: anyio.Event) -> int:
        self._output.parent.mkdir(parents=True, exist_ok=True)
        with self._output.open("ab") as sink:
            process = await anyio.open_process(
                [*command, OWNED],
                stdin=self._theirs.fileno(),
                stdout=sink,
                stderr=sink,
                env=self.environment,
                pass_fds=self._inherited,
                start_new_session=True,  # Ctrl-C in a terminal concerns the keeper alone
            )
        self._process = process
        if stopping.is_set():  # asked to stop while it was being started
            self.signal(signal.SIGTERM)
        log.info("started", child=self.name, pid=process.pid)
        async with anyio.create_task_group() as tasks, process:  # whoever cancels this ends the process with it
            tasks.start_soon(self._watch, name=f"watch {self.name}")
            code = await process.wait()
            tasks.cancel_scope.cancel()
        self._process, self._code = None, code
        log.info("ended", child=self.name, code=code)
        return code

    async def _watch(self) -> None:
        """Name it when it falls silent, kill it when it stays so."""
        self._beaten()  # by a process before it
        usual, silent_s, frozen_s = self._patience, self._patience.first_s / 3, self._patience.first_s
        while True:
            if await self._beats_within(silent_s):
                silent_s, frozen_s = usual.silent_s, usual.frozen_s
                continue
            log.warning(
                "stall", who=self.name, waits_for="a turn of its own loop: it gives no sign of life", since_s=silent_s,
                remedy=f"none needed: it is killed and started again after {frozen_s:g} s of silence",
            )  # fmt: skip
            if await self._beats_within(frozen_s - silent_s) or await self._beats_within(GRACE_S):
                log.info("goes on", child=self.name)
                silent_s, frozen_s = usual.silent_s, usual.frozen_s
                continue
            log.error("frozen, killed", child=self.name, silent_s=frozen_s)
            self.kill()
            return

    async def _beats_within(self, seconds: float) -> bool:
        with anyio.move_on_after(seconds):
            await anyio.wait_readable(self._link)
        return self._beaten()

    def _beaten(self) -> bool:
        """Take in the beats that are there; False when there are none."""
        try:
            return bool(self._link.recv(4096))
        except BlockingIOError:
            return False


def always(*words: str) -> Command:
    """A command that is the same at every start."""

    async def command() -> Sequence[str]:
        return words

    return command
