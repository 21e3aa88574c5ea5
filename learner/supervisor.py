"""Keeps hub and trainer alive: an orderly end on a signal, an exit code that says why."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from typing import Final

import anyio
import structlog

from matpo.errors import UserError, first_error
from matpo.keeper import Kept
from matpo.owner import Owner

log: structlog.stdlib.BoundLogger = structlog.get_logger()

TRAINER_LEAVE_LIMIT_S: Final = 60.0
"""Seconds for the trainer to finish its step and save after SIGTERM; then it is killed."""
TRAINER_FROZEN_S: Final = 120.0
"""A trainer is silent only while no thread of it runs; loading a large model may stop them for a while."""
HUB_LEAVE_LIMIT_S: Final = 15.0
INTERRUPTED: Final = 130


@dataclass(slots=True)
class Supervisor:
    """The hub decides when the run is complete; the trainer ends by itself after its last step."""

    hub: Kept
    trainer: Kept
    owner: Owner
    launched: bool = False
    """The trainer is one of several ranks that a launcher starts again together, this process among them."""
    trainer_leave_limit_s: float = TRAINER_LEAVE_LIMIT_S
    hub_leave_limit_s: float = HUB_LEAVE_LIMIT_S
    _stopping: anyio.Event = field(default_factory=anyio.Event)

    async def run(self) -> int:
        """Until the hub says the run is complete (0), a child reports a user error, or a signal comes (130).

        Raises `UserError` with a child's own words when it cannot go on.
        """
        try:
            with self.hub, self.trainer:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._heed_signals, name="signals")
                    tasks.start_soon(self._drain, name="drain")
                    tasks.start_soon(self.owner.beat_forever, name="beats")
                    tasks.start_soon(self.trainer.keep, self._stopping, name="trainer")
                    code = await self.hub.keep(self._stopping)
                    await self.trainer.end(self.trainer_leave_limit_s)
                    tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            found = first_error(group, UserError)
            if found is None:
                raise
            raise found from group
        return 0 if code == 0 else INTERRUPTED

    async def _heed_signals(self) -> None:
        """The first signal begins an orderly end, a second one kills both at once."""
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                log.info("stopping", signal=number.name)
                if self._stopping.is_set():
                    self.trainer.kill()
                    self.hub.kill()
                self._stopping.set()

    async def _drain(self) -> None:
        """The trainer first: it needs the hub to record the step it is in before it saves."""
        await self._stopping.wait()
        code = await self.trainer.end(self.trainer_leave_limit_s)
        if self.launched and code not in (0, INTERRUPTED):
            self.hub.kill()  # an orderly end would send the actors home, and the launcher is about to start all again
        else:
            await self.hub.end(self.hub_leave_limit_s)
