"""The trainer's questions to the hub. Each may be asked twice, so a hub that restarts in between is only waited for."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Final, Self

import structlog

from learner.trainer.intake import StepInput
from learner.trainer.pulse import Pulse
from matpo.folder import HubAddress, RunFolder
from protocols.channel import HubSilent, TrainerLink
from protocols.messages import (
    PROTOCOL,
    Batch,
    BatchRequest,
    HubMessage,
    NotYet,
    Ok,
    Publish,
    Refuse,
    StepDone,
    TrainerHello,
    TrainerWelcome,
)
from protocols.records import step_of

ANSWER_DEADLINE_S: Final = 300.0
"""Longest the hub may be away before the trainer gives up (its supervisor starts it again)."""
PATIENCE_S: Final = 15.0
"""After so long without an answer, look whether the hub now listens elsewhere."""
HUB_START_S: Final = 60.0
PAUSE_S: Final = 0.2
"""Shortest time between two requests for a batch, should the hub answer `NotYet` at once."""

log = structlog.get_logger()


class Refused(Exception):
    """The hub will not take what the trainer says: another trainer is at work or the journal is of another run."""


class NoHub(Exception):
    """No hub of the run listens; it may be starting again."""


class Hub:
    """The hub as the trainer sees it."""

    def __init__(self, folder: RunFolder, stopping: threading.Event) -> None:
        """Find the hub of a run. Raises `NoHub` if none listens within a minute."""
        self._folder = folder
        self._stopping = stopping
        self._endpoint = _address(folder, stopping).trainer_endpoint
        self._link = TrainerLink(self._endpoint)
        self._pulse = Pulse(folder)

    def __enter__(self) -> Self:
        self._pulse.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pulse.__exit__(kind, error, trace)
        self._link.__exit__(kind, error, trace)

    def hello(self, *, step: int, config_digest: str) -> int:
        """Say at which step the trainer is; returns the lineage its versions belong to."""
        answer, _ = self._ask(TrainerHello(protocol=PROTOCOL, step=step, config_digest=config_digest), "a welcome")
        if not isinstance(answer, TrainerWelcome):
            raise Refused(f"the hub answered the trainer's hello with {answer.kind}")
        return answer.lineage

    def poll(self, step: int, *, settled: int) -> tuple[Batch, tuple[memoryview, ...]] | None:
        """Ask for the groups of `step`; None when the hub has not enough of them yet.

        `settled`: no checkpoint of an earlier step is kept.
        """
        self._pulse.rest()
        asked = time.monotonic()
        answer, frames = self._ask(BatchRequest(step=step, settled=settled), f"the batch of step {step}")
        match answer:
            case Batch():
                self._pulse.enter("step", step)
                return answer, frames
            case NotYet():
                self._stopping.wait(max(0.0, PAUSE_S - (time.monotonic() - asked)))
                return None
            case _:
                raise Refused(f"the hub answered a batch request with {answer.kind}")

    def done(self, lineage: int, step: int, taken: StepInput) -> None:
        """Have the ledger record the step."""
        message = StepDone(lineage=lineage, step=step, trained=taken.trained, filtered=taken.filtered)
        self._expect_ok(message, f"step {step} in the ledger")
        self._pulse.enter("publish", step)

    def publish(self, message: Publish) -> None:
        """Announce weights whose files are on disk."""
        self._expect_ok(message, f"version {message.version} taken over")
        self._pulse.enter("checkpoint", step_of(message.version))

    def _expect_ok(self, message: StepDone | Publish, waiting_for: str) -> None:
        answer, _ = self._ask(message, waiting_for)
        if not isinstance(answer, Ok):
            raise Refused(f"the hub answered {message.kind} with {answer.kind}")

    def _ask(
        self, message: TrainerHello | BatchRequest | StepDone | Publish, waiting_for: str
    ) -> tuple[HubMessage, tuple[memoryview, ...]]:
        deadline = time.monotonic() + ANSWER_DEADLINE_S
        while True:
            try:
                answer, frames = self._link.request(message, deadline_s=PATIENCE_S, waiting_for=waiting_for)
            except HubSilent as error:
                log.warning("hub silent", waiting_for=waiting_for, reason=str(error))
                if time.monotonic() > deadline or self._stopping.is_set():  # a step the ledger lacks is taken again
                    raise
                self._follow()
                continue
            if isinstance(answer, Refuse):
                raise Refused(f"the hub refused {message.kind} ({answer.reason}): {answer.detail}")
            return answer, frames

    def _follow(self) -> None:
        """A restarted hub may listen elsewhere (where the run's path is too long for a socket it takes a new one)."""
        address = self._folder.hub_address()
        if address is not None and address.trainer_endpoint != self._endpoint:
            self._link.__exit__(None, None, None)
            self._endpoint = address.trainer_endpoint
            self._link = TrainerLink(self._endpoint)


def _address(folder: RunFolder, stopping: threading.Event) -> HubAddress:
    """Hub and trainer are started together, so hub.json may take a moment; a file can only be looked at again."""
    deadline = time.monotonic() + HUB_START_S
    while time.monotonic() < deadline and not stopping.is_set():
        address = folder.hub_address()
        if address is not None:
            return address
        stopping.wait(0.05)
    raise NoHub(
        f"no hub of run {str(folder.path)!r} listens after {HUB_START_S:g} s;"
        f" start `matpo-learner --run {folder.path}`, which starts hub and trainer"
    )
