"""Keeps hub and trainer alive: restarts with backoff, an orderly end on a signal, an exit code that says why."""

from __future__ import annotations

import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import anyio
import structlog
from anyio.abc import Process

from matpo.errors import UserError, first_error

log: structlog.stdlib.BoundLogger = structlog.get_logger()

PAUSES_S: Final = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
"""Before the first, second, … restart in a row."""
HEALTHY_S: Final = 60.0
"""A child that lived so long starts its backoff afresh."""
MOST_FAILURES: Final = 10
"""In a row; then the learner gives up: it is not an accident."""
TRAINER_LEAVE_LIMIT_S: Final = 60.0
"""Seconds for the trainer to finish its step and save after SIGTERM; then it is killed."""
HUB_LEAVE_LIMIT_S: Final = 15.0
USER_ERROR: Final = 2
INTERRUPTED: Final = 130


@dataclass(slots=True)
class Child:
    """One command to keep alive."""

    name: str
    command: tuple[str, ...]
    process: Process | None = None
    failures: int = 0
    """In a row."""


@dataclass(slots=True)
class Supervisor:
    """The hub decides when the run is complete; the trainer ends by itself after its last step."""

    hub: Child
    trainer: Child
    output: Path
    """Folder for what the children print, as NAME.out."""
    environment: dict[str, str]
    pauses_s: tuple[float, ...] = PAUSES_S
    trainer_leave_limit_s: float = TRAINER_LEAVE_LIMIT_S
    hub_leave_limit_s: float = HUB_LEAVE_LIMIT_S
    _stopping: anyio.Event = field(default_factory=anyio.Event)

    async def run(self) -> int:
        """Until the hub says the run is complete (0), a child reports a user error, or a signal comes (130).

        Raises `UserError` with a child's own words when it cannot go on.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._heed_signals, name="signals")
                tasks.start_soon(self._drain, name="drain")
                tasks.start_soon(self._keep_trainer, name="trainer")
                complete = await self._keep(self.hub)
                await self._end(self.trainer, self.trainer_leave_limit_s)
                tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            found = first_error(group, UserError)
            if found is None:
                raise
            raise found from group
        finally:
            self._kill()
        return 0 if complete else INTERRUPTED

    async def _keep_trainer(self) -> None:
        await self._keep(self.trainer)

    async def _keep(self, child: Child) -> bool:
        """Start a child again and again; True once it ends with 0, False when it was told to stop."""
        while not self._stopping.is_set():
            began = time.monotonic()
            code = await self._once(child)
            if code == 0 and not self._stopping.is_set():
                return True
            if self._stopping.is_set():
                return code == 0 and child is self.hub
            if code == USER_ERROR:
                raise UserError(f"the {child.name} could not go on: {self.last_words(child)}")
            child.failures = 1 if time.monotonic() - began > HEALTHY_S else child.failures + 1
            if child.failures >= MOST_FAILURES:
                raise UserError(
                    f"the {child.name} died {child.failures} times in a row: {self.last_words(child)};"
                    f" see {self.output / child.name}.out"
                )
            pause_s = self.pauses_s[min(child.failures, len(self.pauses_s)) - 1]
            log.warning("restarting", child=child.name, code=code, failures=child.failures, pause_s=pause_s)
            with anyio.move_on_after(pause_s):
                await self._stopping.wait()
        return False

    async def _once(self, child: Child) -> int:
        with (self.output / f"{child.name}.out").open("ab") as sink:
            process = await anyio.open_process(
                list(child.command), stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=self.environment
            )
        child.process = process
        if self._stopping.is_set():  # asked to stop while it was being started
            _send(process, signal.SIGTERM)
        log.info("started", child=child.name, pid=process.pid)
        async with process:  # whoever cancels this ends the child with it
            code = await process.wait()
        child.process = None
        log.info("ended", child=child.name, code=code)
        return code

    async def _end(self, child: Child, limit_s: float) -> None:
        """Tell a child to finish what it does (a last checkpoint) and end; who does not in time is killed."""
        process = child.process
        if process is None:
            return
        _send(process, signal.SIGTERM)
        with anyio.move_on_after(limit_s):
            await process.wait()
            return
        _send(process, signal.SIGKILL)

    async def _heed_signals(self) -> None:
        """The first signal begins an orderly end, a second one kills both at once."""
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                log.info("stopping", signal=number.name)
                if self._stopping.is_set():
                    self._kill()
                self._stopping.set()

    async def _drain(self) -> None:
        """The trainer first: it needs the hub to record the step it is in before it saves."""
        await self._stopping.wait()
        await self._end(self.trainer, self.trainer_leave_limit_s)
        await self._end(self.hub, self.hub_leave_limit_s)

    def last_words(self, child: Child) -> str:
        """The last line a child printed."""
        output = self.output / f"{child.name}.out"
        lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines() if output.is_file() else []
        return lines[-1].removeprefix("error: ") if lines else "it printed nothing"

    def _alive(self) -> list[Process]:
        return [child.process for child in (self.hub, self.trainer) if child.process is not None]

    def _kill(self) -> None:
        for process in self._alive():
            _send(process, signal.SIGKILL)


def _send(process: Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except ProcessLookupError:
        return  # it ended by itself
