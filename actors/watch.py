"""What the actor waits for: told to the hub in heartbeats, and logged here when it lasts, for it may be the hub."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import anyio

from actors.engines.engine import EngineHealth
from matpo.waits import Condition, WaitBook, log_stalls, waiting
from protocols.messages import Wait

QUIET_S = 5.0
"""Silence for less than this is nothing to report."""


class Watched(Protocol):
    """What is looked at of an `actors.engines.engine.Engine`."""

    @property
    def version(self) -> int: ...

    async def health(self) -> EngineHealth: ...


class Waiter(Protocol):
    """A part that can be kept waiting."""

    @property
    def waiting_for(self) -> Condition | None: ...


class ToolServers(Protocol):
    """What is looked at of the tools."""

    def silent(self) -> Iterable[tuple[str, float]]:
        """Every server, and the seconds for which calls to it have been without any answer."""
        ...


class Watch:
    """Looks at everything the actor can wait for."""

    def __init__(
        self,
        actor_id: str,
        engine: Watched,
        *,
        own: Sequence[Waiter],
        tools: ToolServers,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`own`: parts of the actor that know what they wait for."""
        self._actor_id = actor_id
        self._engine = engine
        self._own = own
        self._tools = tools
        self._book = WaitBook(actor_id)
        self._clock = clock
        self._heard_s = self._moved_s = clock()
        self._sampled = -1

    @property
    def version(self) -> int:
        """Of the weights the engine holds."""
        return self._engine.version

    def hear(self) -> None:
        """The hub said something."""
        self._heard_s = self._clock()

    async def look(self) -> tuple[EngineHealth, tuple[Wait, ...]]:
        """How the engine is and what is waited for now; what has become a stall is logged, once."""
        health, now_s = await self._engine.health(), self._clock()
        if not health.running or health.sampled_tokens != self._sampled:
            self._sampled, self._moved_s = health.sampled_tokens, now_s
        waits = self._book.update(self._conditions(health, now_s), now_s)
        log_stalls(self._book, waits)
        return health, waits

    async def run(self, every_s: float) -> None:
        """Look every so many seconds, whether or not there is a hub to tell."""
        while True:
            await self.look()
            await anyio.sleep(every_s)

    def _conditions(self, health: EngineHealth, now_s: float) -> Iterator[Condition]:
        yield from (part.waiting_for for part in self._own if part.waiting_for is not None)
        if now_s - self._heard_s > QUIET_S:
            yield waiting("hub", since_s=self._heard_s)
        if now_s - self._moved_s > QUIET_S:
            yield waiting(
                "engine", since_s=self._moved_s, running=health.running, detail=health.detail, actor=self._actor_id
            )
        for server in health.silent:
            yield waiting("engine_server", server=server, actor=self._actor_id)
        for server, silent_s in self._tools.silent():
            if silent_s > QUIET_S:
                yield waiting("tool_server", since_s=now_s - silent_s, server=server)
