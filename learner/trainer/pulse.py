"""Tells the hub what the trainer is busy with, beside the training and whatever that does."""

from __future__ import annotations

import contextvars
import threading
import time
from types import TracebackType
from typing import Final, Literal, Self

from matpo.folder import RunFolder
from matpo.waits import Condition, WaitBook, log_stalls, waiting
from protocols.channel import HubSilent, TrainerLink
from protocols.messages import TrainerBeat, Wait

EVERY_S: Final = 2.0
ANSWER_S: Final = 5.0
"""A beat not answered for so long is repeated, to where the hub listens by then."""
Stage = Literal["step", "publish", "checkpoint"]


class Pulse:
    """A thread that sends a `TrainerBeat` every few seconds: a frozen process sends none, a stuck one says where."""

    def __init__(self, folder: RunFolder, *, every_s: float = EVERY_S) -> None:
        self._folder = folder
        self._every_s = every_s
        self._stopping = threading.Event()
        self._stage: tuple[Stage, int, float] | None = None
        """Stage, step, and since when."""
        self._book = WaitBook("trainer")
        self._answered_s = time.monotonic()
        # What is bound to this thread's log lines is to be in those of the other.
        self._thread = threading.Thread(target=contextvars.copy_context().run, args=(self._beat,), name="pulse")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()

    def enter(self, stage: Stage, step: int) -> None:
        """A stage of `step` begins."""
        self._stage = stage, step, time.monotonic()

    def rest(self) -> None:
        """The hub is asked for work: what that waits for, the hub knows best."""
        self._stage = None

    def waits(self) -> tuple[Wait, ...]:
        """What the trainer waits for now; stalls are logged."""
        now_s = time.monotonic()
        waits = self._book.update(self._conditions(now_s), now_s)
        log_stalls(self._book, waits)
        return waits

    def _conditions(self, now_s: float) -> list[Condition]:
        found, stage = [], self._stage
        if stage is not None:
            found.append(waiting(stage[0], since_s=stage[2], step=stage[1]))
        if now_s - self._answered_s > ANSWER_S:
            found.append(waiting("hub_answer", since_s=self._answered_s))
        return found

    def _beat(self) -> None:
        while not self._stopping.is_set():
            address = self._folder.hub_address()
            if address is not None:
                with TrainerLink(address.trainer_endpoint) as link:
                    self._tell(link)
            self.waits()
            self._stopping.wait(self._every_s)

    def _tell(self, link: TrainerLink) -> None:
        """Keep telling the hub at this address until it does not answer."""
        try:
            while True:
                link.request(TrainerBeat(waits=self.waits()), deadline_s=ANSWER_S, waiting_for="the trainer's pulse")
                self._answered_s = time.monotonic()
                if self._stopping.wait(self._every_s):
                    return
        except HubSilent:
            return  # once that lasts, `waits` says so
