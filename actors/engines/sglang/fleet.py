"""The servers an engine drives: which there are, which one a request goes to, and giving all of them new weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Protocol

import anyio
import anyio.abc

from actors.engines.engine import EngineFailure
from actors.engines.sglang.affinity import choose
from actors.engines.sglang.client import ServerGone, ServerRefused
from actors.engines.sglang.handover import Parcel
from actors.engines.sglang.keeper import ServerDied
from actors.engines.sglang.line import Counts, Line
from actors.engines.sglang.progress import Progress
from actors.engines.sglang.router import Router
from actors.engines.sglang.server import SWAP_DEADLINE_S, Server
from matpo.config import Sampling
from protocols.records import StopReason

LAG_S: Final = 30.0
LAG_FACTOR: Final = 4.0
"""When one server has taken weights in t seconds, the others get `LAG_FACTOR` · t + `LAG_S` more."""


class Attempts(Protocol):
    """Where a request can be sent: a server, or a router in front of all of them."""

    async def attempt(self, progress: Progress, sampling: Sampling, *, group: str) -> StopReason | None: ...


class Fleet:
    """Any number of servers that come and go. One that is not usable costs nobody else anything."""

    def __init__(self) -> None:
        self.servers: dict[str, Server] = {}
        self.router: Router | None = None
        self.counts = Counts()
        """Of all servers that ever were here."""
        self._changed = anyio.Event()

    @property
    def usable(self) -> Sequence[Server]:
        """The servers that requests may be sent to."""
        return [server for server in self.servers.values() if server.usable]

    @property
    def parcels(self) -> set[Parcel]:
        """What servers hold, and would fall back to when loading fails, and what they are being given."""
        parcels = {parcel for server in self.servers.values() for parcel in (server.holds, server.taking)}
        return {parcel for parcel in parcels if parcel is not None}

    def notice(self, server: Server) -> None:
        """A server's state is new: wake who waits, and have requests go on elsewhere that cannot go on there."""
        state = server.keeper.state
        if state == "failed" or (state == "silent" and self.usable):
            server.line.interrupt()
            if self.router is not None:
                self.router.line.interrupt()  # nobody knows which of its requests are there
        self._changed.set()
        self._changed = anyio.Event()

    async def wait(self, condition: Callable[[], bool]) -> None:
        """Until `condition` holds; it is looked at whenever a server's state is new."""
        while not condition():
            await self._changed.wait()

    async def wait_started(self, servers: Sequence[Server]) -> None:
        """Until each has come up once. Raises `ServerDied` as soon as one fails."""
        failed: list[Server] = []

        def settled() -> bool:
            failed[:] = [server for server in servers if server.keeper.state == "failed"]
            return bool(failed) or all(server.keeper.state not in ("starting", "silent") for server in servers)

        await self.wait(settled)
        if failed:
            raise ServerDied(failed[0].keeper.detail, server=failed[0].name)

    @contextmanager
    def joined(self, server: Server) -> Iterator[None]:
        """The server belongs to the fleet while the block lasts."""
        self.servers[server.name] = server
        try:
            yield
        finally:
            del self.servers[server.name]
            self.notice(server)

    async def pick(self, group: str) -> Attempts:
        """Where a request of the group goes; waits until there is something."""
        await self.wait(lambda: bool(self.usable))
        if self.router is not None and self.router.usable:
            return self.router
        return self.servers[choose(group, {server.name: server.line.running for server in self.usable})]

    async def deliver(self, parcel: Parcel) -> float:
        """Give the weights to every server that is up, at the same time; the others get them from their keepers
        before they are used.

        Returns the longest pause in seconds. Raises `EngineFailure` when no server took them.
        """
        pauses: list[float] = []
        refusals: list[str] = []
        giving = [server for server in self.servers.values() if server.keeper.state == "ready"]
        began = anyio.current_time()
        async with anyio.create_task_group() as tasks:

            async def give(server: Server) -> None:
                try:
                    pauses.append(await server.take(parcel))
                except (ServerGone, ServerRefused) as error:
                    refusals.append(f"server {server.name}: {error}")
                else:
                    now = anyio.current_time()
                    deadline = now + LAG_FACTOR * (now - began) + LAG_S
                    tasks.cancel_scope.deadline = min(tasks.cancel_scope.deadline, deadline)

            for server in giving:
                tasks.start_soon(give, server, name=f"weights to server {server.name}")
        if not pauses and refusals:
            raise EngineFailure(f"no sglang server took version {parcel.version}: {'; '.join(refusals)}")
        if not pauses:
            await self._wait_held(parcel)
        return max(pauses, default=0.0)

    async def _wait_held(self, parcel: Parcel) -> None:
        """Until a server that is coming up has been given the weights."""
        with anyio.move_on_after(SWAP_DEADLINE_S):
            await self.wait(lambda: any(server.holds is parcel for server in self.usable))
            return
        raise EngineFailure(f"no sglang server was ready for version {parcel.version}: {self.description}")

    @property
    def running(self) -> int:
        """Requests being sampled."""
        return sum(line.running for line in self._lines)

    @property
    def _lines(self) -> Iterator[Line]:
        for server in self.servers.values():
            yield server.line
        if self.router is not None:
            yield self.router.line

    @property
    def description(self) -> str:
        """One line for people."""
        return "; ".join(server.description for server in self.servers.values()) or "no server"
