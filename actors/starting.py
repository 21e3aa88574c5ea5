"""The first minutes of an actor: the hub hears from it, and what it waits for, before engine and tools are there."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Protocol, Self

import anyio

from actors.tools.plane import Starts
from matpo.waits import Condition, WaitBook, log_stalls, waiting
from protocols.messages import Heartbeat


class Sender(Protocol):
    """What is needed of `protocols.channel.HubClient`."""

    async def send(self, message: Heartbeat) -> bool: ...


class Finished(Protocol):
    """What is looked at of the outbox: trees of an earlier process of this actor."""

    @property
    def leases(self) -> frozenset[str]: ...

    def __len__(self) -> int: ...


class Starting:
    """Heartbeats until `over`. They give back what an earlier process of this actor had leased and not finished."""

    def __init__(self, actor_id: str, hub: Sender, outbox: Finished, *, every_s: float) -> None:
        self._actor_id = actor_id
        self._hub = hub
        self._outbox = outbox
        self._every_s = every_s
        self._book = WaitBook(actor_id)
        self._began_s = time.monotonic()
        self._tools: Starts | None = None
        self._scope = anyio.CancelScope()

    @classmethod
    @asynccontextmanager
    async def beating(cls, actor_id: str, hub: Sender, outbox: Finished, *, every_s: float) -> AsyncIterator[Self]:
        """Beat for the length of the block, or until `over`."""
        starting = cls(actor_id, hub, outbox, every_s=every_s)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(starting._beat, name="heartbeats while starting")
            yield starting
            starting.over()

    def tools(self, starts: Starts) -> None:
        """The engine is up; now the tool servers start."""
        self._tools = starts

    def over(self) -> None:
        """Everything is up: others beat from now on."""
        self._scope.cancel()

    async def _beat(self) -> None:
        with self._scope:
            while True:
                waits = self._book.update(self._conditions(), time.monotonic())
                log_stalls(self._book, waits)
                beat = Heartbeat(
                    leases=tuple(sorted(self._outbox.leases)),
                    version=-1,
                    live_episodes=0,
                    outbox_trees=len(self._outbox),
                    sampled_tokens=0,
                    waits=waits,
                )
                await self._hub.send(beat)
                await anyio.sleep(self._every_s)

    def _conditions(self) -> Iterator[Condition]:
        if self._tools is None:
            yield waiting("engine_start", since_s=self._began_s, actor=self._actor_id)
            return
        for server, since_s in self._tools():
            yield waiting("tool_server_start", since_s=time.monotonic() - since_s, server=server)
