"""A router (smg or sglang-router) in front of servers: requests go through it, everything else to the servers."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Mapping
from typing import Final

import anyio
import structlog
import xxhash

from actors.engines.sglang.answers import UNVERSIONED
from actors.engines.sglang.client import ServerGone, ServerRefused, SglangClient
from actors.engines.sglang.line import Counts, Line, Ticket
from actors.engines.sglang.model import ModelFacts
from actors.engines.sglang.progress import Progress
from actors.engines.sglang.server import Server
from matpo.config import Sampling
from matpo.config import SglangEngine as Settings
from protocols.records import StopReason

log: structlog.stdlib.BoundLogger = structlog.get_logger()

LOOK_S: Final = 5.0
LOOK_DEADLINE_S: Final = 10.0


class Router:
    """Knows its workers. It is used while all of them are: it cannot be told to spare one whose weights are in doubt,
    and it takes its time to notice one that froze. Meanwhile requests go to the good servers directly."""

    def __init__(
        self,
        client: SglangClient,
        facts: ModelFacts,
        settings: Settings,
        *,
        counts: Counts,
        servers: Mapping[str, Server],
    ) -> None:
        """`servers`: those behind it, as they come and go, by URL."""
        self.client = client
        self.line = Line(client, facts, settings, counts=counts, abort=self._abort, broken=self._suspect)
        self._servers = servers
        self._workers: frozenset[str] = frozenset()
        self._suspected = anyio.Event()
        self._trusted = False

    @property
    def usable(self) -> bool:
        """Whether requests may be sent through it."""
        return (
            self._trusted
            and bool(self._workers)
            and all(url in self._servers and self._servers[url].usable for url in self._workers)
        )

    async def attempt(self, progress: Progress, sampling: Sampling, *, group: str) -> StopReason | None:
        """One request; see `Line.attempt`."""
        routing_key = xxhash.xxh3_64_hexdigest(group.encode()) if group else ""
        held = {server.holds for server in self._servers.values()}
        parcel = held.pop() if len(held) == 1 else None
        if parcel is None:  # nobody knows which weights it will meet
            ticket = Ticket(UNVERSIONED, uuid.uuid4().hex, routing_key)
        else:
            ticket = Ticket(parcel.version, parcel.cache_key, routing_key)
        return await self.line.attempt(progress, sampling, ticket)

    async def look(self) -> frozenset[str]:
        """URLs of its workers. Raises `ServerGone` or `ServerRefused`."""
        self._workers = await self.client.workers(deadline_s=LOOK_DEADLINE_S)
        self._trusted = True
        return self._workers

    async def watch(self) -> AsyncGenerator[frozenset[str], None]:
        """Its workers, asked for every few seconds and when a request broke."""
        while True:
            self._suspected = anyio.Event()
            try:
                yield await self.look()
            except (ServerGone, ServerRefused) as error:
                if self._trusted:
                    log.warning("router lost", url=self.client.url, reason=str(error))
                self._trusted = False
            with anyio.move_on_after(LOOK_S):
                await self._suspected.wait()

    def _abort(self, rid: str) -> None:
        for server in self._servers.values():
            server.abort(rid)

    def _suspect(self, reason: str) -> None:
        """A request broke: it may be the router, or the worker behind it. Each is asked how it is."""
        self._trusted = False
        for server in self._servers.values():
            server.keeper.suspect(reason)
        self._suspected.set()
