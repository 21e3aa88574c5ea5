"""The hub's loop: receive, write down, commit, answer. All messages that are there share one transaction."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import anyio
import structlog
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from learner.hub.core import Hub, Outgoing, Side
from learner.hub.journal import Journal
from learner.hub.status import StatusReporter
from matpo.length_bias import REMEDY
from matpo.metrics import MetricsFile
from matpo.waits import WaitBook, log_stalls
from protocols.channel import HubSocket, Received

log: structlog.stdlib.BoundLogger = structlog.get_logger()

INBOX_MESSAGES = 64
"""Received and not yet handled; beyond it the network waits."""
FAREWELL_S = 3.0
"""Longest that a hub that is done waits for its actors to say goodbye."""
TICK_S = 0.25


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Interrupt:
    """A signal asked the hub to end."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """A message of an actor or the trainer."""

    side: Side
    received: Received


Event = Tick | Interrupt | Arrived | Outgoing
"""An `Outgoing` here is one that found its peer gone."""


class Service:
    """Carries messages between the sockets and the `Hub` until the run is complete or interrupted."""

    def __init__(
        self, hub: Hub, journal: Journal, metrics: MetricsFile, *, sockets: dict[Side, HubSocket], steps: int,
        heartbeat_s: float, beat: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """`beat` is called in every round, at least four times a second as long as the hub is not stuck."""
        self._hub = hub
        self._journal = journal
        self._metrics = metrics
        self._sockets = sockets
        self._heartbeat_s = heartbeat_s
        self._beat = beat
        self._waits = WaitBook("hub")
        now_s = time.monotonic()
        refused: tuple[dict[str, int], ...] = tuple(socket.refused for socket in sockets.values())
        counted = journal.counter("trees"), journal.counter("sampled_tokens")
        self._status = StatusReporter(hub, journal, steps, self._waits, refused, now_s, *counted)
        self._next_status_s = now_s
        self._undelivered: list[Outgoing] = []
        self._biased = False

    async def run(self) -> bool:
        """Serve until all is done; True if the run is complete, False if a signal ended it."""
        send, receive = anyio.create_memory_object_stream[Event](INBOX_MESSAGES)
        async with anyio.create_task_group() as tasks, send, receive:
            for side in self._sockets:
                tasks.start_soon(self._listen, side, send, name=f"listen-{side}")
            tasks.start_soon(_tick, send, name="tick")
            tasks.start_soon(_heed_signals, send, name="signals")
            complete = await self._serve(receive)
            tasks.cancel_scope.cancel()
        return complete

    async def _serve(self, inbox: MemoryObjectReceiveStream[Event]) -> bool:
        while True:
            events = [*self._undelivered, await inbox.receive()]
            self._undelivered = []
            events += _waiting(inbox)
            self._beat()
            now_s, at = time.monotonic(), time.time()
            with self._journal.transaction():
                interrupted = self._handle(events, now_s=now_s, at=at)
                finished = self._hub.advance(now_s=now_s, at=at)
                complete = self._hub.complete
                if complete or interrupted:
                    self._hub.drain("the run is complete" if complete else "the learner was asked to stop")
            await self._send_all()
            self._hub.weights.delete_old()
            for record in finished:
                self._metrics.append("evaluation", record)
            while self._hub.swaps:
                self._metrics.append("weights", self._hub.swaps.pop(0))
            if complete or interrupted or now_s >= self._next_status_s:
                self._report(now_s)
            if complete or interrupted:
                await self._farewell(inbox)
                return complete

    async def _farewell(self, inbox: MemoryObjectReceiveStream[Event]) -> None:
        """Stay until the actors have left, or a few seconds: each hears that it may go, and its last trees are kept."""
        with anyio.move_on_after(FAREWELL_S):
            while self._hub.roster.live(time.monotonic()):
                events = [*self._undelivered, await inbox.receive(), *_waiting(inbox)]
                self._undelivered = []
                with self._journal.transaction():
                    self._handle(events, now_s=time.monotonic(), at=time.time())
                    self._hub.drain(self._hub.draining or "the run is ending")
                await self._send_all()

    def _handle(self, events: list[Event], *, now_s: float, at: float) -> bool:
        """Act on events in their order; True when one of them asks the hub to end."""
        interrupted = False
        for event in events:
            match event:
                case Arrived(side=side, received=received):
                    self._hub.handle(side, received, now_s=now_s, at=at)
                case Outgoing():
                    self._hub.undelivered(event)
                case Interrupt():
                    interrupted = True
                case Tick():
                    pass
        return interrupted

    async def _send_all(self) -> None:
        for outgoing in self._hub.take_outgoing():
            socket = self._sockets[outgoing.side]
            if not await socket.send(outgoing.peer, outgoing.message, outgoing.frames):
                self._undelivered.append(outgoing)

    def _report(self, now_s: float) -> None:
        self._next_status_s = now_s + self._heartbeat_s
        with self._journal.snapshot():
            status = self._status.read(now_s)
        self._metrics.append("hub", status)
        log_stalls(self._waits, status.waits)
        if status.bias.alarms and not self._biased:
            log.warning("length bias", found=status.bias.alarms, remedy=REMEDY)
        self._biased = bool(status.bias.alarms)

    async def _listen(self, side: Side, inbox: MemoryObjectSendStream[Event]) -> None:
        while True:
            await inbox.send(Arrived(side, await self._sockets[side].receive()))


def _waiting(inbox: MemoryObjectReceiveStream[Event]) -> list[Event]:
    """Everything that has arrived already."""
    events: list[Event] = []
    while len(events) < INBOX_MESSAGES:
        try:
            events.append(inbox.receive_nowait())
        except anyio.WouldBlock:
            break
    return events


async def _tick(inbox: MemoryObjectSendStream[Event]) -> None:
    while True:
        await inbox.send(Tick())
        await anyio.sleep(TICK_S)


async def _heed_signals(inbox: MemoryObjectSendStream[Event]) -> None:
    """The first signal ends the run in order; a second one ends the process at once."""
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("asked to stop", signal=number.name)
            await inbox.send(Interrupt())
            break
