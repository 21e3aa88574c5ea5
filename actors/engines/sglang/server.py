"""One SGLang server: its requests, the weights it holds, and giving it new ones."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import anyio
import anyio.abc
import structlog

from actors.engines.sglang.answers import UNVERSIONED
from actors.engines.sglang.attestation import Layout, first_difference
from actors.engines.sglang.client import ServerGone, ServerRefused, SglangClient
from actors.engines.sglang.features import look
from actors.engines.sglang.handover import Handover, Parcel
from actors.engines.sglang.keeper import Keeper, Launch
from actors.engines.sglang.line import Counts, Line, Ticket
from actors.engines.sglang.model import ModelFacts
from actors.engines.sglang.progress import Progress
from matpo.config import Sampling
from matpo.config import SglangEngine as Settings
from protocols.records import StopReason

log: structlog.stdlib.BoundLogger = structlog.get_logger()

SWAP_DEADLINE_S: Final = 300.0
"""For weights to be loaded; a large model from a disk takes minutes."""
PAUSE_DEADLINE_S: Final = 30.0
"""For a server to stop or go on sampling, and to answer what it holds."""
LEAVE_S: Final = 5.0
"""For a server that goes on without us to drop what it was given."""


class Server:
    """Answers requests and takes weights. Its keeper says when it may be used, and gives it the newest weights
    before."""

    def __init__(
        self,
        name: str,
        client: SglangClient,
        *,
        facts: ModelFacts,
        settings: Settings,
        handover: Handover,
        counts: Counts,
        launch: Launch | None,
        newest: Callable[[], Parcel | None],
        changed: Callable[[Server], None],
        errands: anyio.abc.TaskGroup,
    ) -> None:
        """`launch` starts it; None: it is somebody else's. `newest`: the weights every server ought to hold. `changed`
        is told when it may be used, or not any more. `errands`: for what nobody waits for."""
        self.name = name
        self.client = client
        self.keeper = Keeper(
            client,
            launch,
            bring_up=self._bring_up,
            changed=lambda: changed(self),
            start_timeout_s=settings.start_timeout_s,
        )
        self.line = Line(client, facts, settings, counts=counts, abort=self.abort, broken=self.keeper.suspect)
        self.holds: Parcel | None = None
        """The weights it samples with; None: those it was started with, or some that are in doubt."""
        self.taking: Parcel | None = None
        """The weights it is being given."""
        self._layout = Layout.of(facts, settings)
        self._settings = settings
        self._handover = handover
        self._newest = newest
        self._errands = errands
        self._users: Counter[Parcel] = Counter()
        """Requests under way that are to be sampled with a parcel's weights."""
        self._lent: set[Parcel] = set()
        """What it was given beside its own weights and has not dropped."""
        self._ours = launch is not None
        self._swap = anyio.Lock()

    @property
    def usable(self) -> bool:
        """Whether requests may be sent."""
        return self.keeper.state == "ready" and self.holds is not None

    @property
    def version(self) -> int:
        """Of the weights it samples with."""
        return UNVERSIONED if self.holds is None else self.holds.version

    @property
    def description(self) -> str:
        """One line for people."""
        return (
            f"server {self.name} at {self.client.url}: {self.keeper.detail}, version {self.version},"
            f" {self.line.running} running, {self.keeper.starts} starts"
        )

    async def attempt(self, progress: Progress, sampling: Sampling, *, group: str) -> StopReason | None:
        """One request; see `Line.attempt`."""
        parcel = self.holds
        if parcel is None:
            return await self.line.attempt(progress, sampling, Ticket(UNVERSIONED, ""))
        self._users[parcel] += 1
        try:
            adapter = parcel.adapter_of(progress.adapter)
            # Keys and values of different adapters are different, and those of none outlive a version.
            cache_key = f"{parcel.cache_key}-{progress.adapter}" if adapter else parcel.cache_key
            ticket = Ticket(parcel.version, cache_key, adapter=adapter, settled=bool(parcel.adapters))
            return await self.line.attempt(progress, sampling, ticket)
        finally:
            self._users[parcel] -= 1
            self._let_go(parcel)

    def abort(self, rid: str) -> None:
        """Have the server end a request, if it has it."""
        self._errands.start_soon(self.client.abort, rid, name="abort")

    async def take(self, parcel: Parcel) -> float:
        """Swap the weights. Returns how long nothing was sampled, in seconds.

        Raises `ServerGone` or `ServerRefused` when that fails; the keeper then replaces the server, or tries again.
        """
        async with self._swap:
            if self.holds is parcel:
                return 0.0
            return await self._push(parcel)

    async def _bring_up(self, *, fresh: bool) -> None:
        """See that the server is one we can use and holds the newest weights, whatever became of it meanwhile."""
        if fresh:
            self.holds = None
            self._lent.clear()
            await look(self.client, self._settings)
        elif (known := self.holds) and not await self._handover.held(known, self.client, deadline_s=PAUSE_DEADLINE_S):
            self.holds = None
        while (parcel := self._newest()) is not None and parcel is not self.holds:
            await self.take(parcel)

    async def _push(self, parcel: Parcel) -> float:
        return await (self._replace(parcel) if self._handover.pauses else self._add(parcel))

    async def _add(self, parcel: Parcel) -> float:
        """Beside what it holds: requests under way finish with what they began with, and nothing pauses."""
        before, trouble = self.holds, f"version {parcel.version} took it too long"
        self._lent.add(parcel)
        try:
            await self._handover.deliver(parcel, self.client, flush=False, deadline_s=SWAP_DEADLINE_S)
            self.holds = parcel
        except (ServerGone, ServerRefused) as error:
            trouble = str(error)
            raise
        finally:
            if self.holds is not parcel:
                self._condemn(trouble)
        log.info("server took an adapter", server=self.name, version=parcel.version)
        if before is not None:
            self._let_go(before)
        return 0.0

    def _let_go(self, parcel: Parcel) -> None:
        """Have the server forget a parcel that no request uses any more."""
        if self._users[parcel] == 0:
            del self._users[parcel]
            if parcel not in (self.holds, self._newest()):
                self._errands.start_soon(self._retire, parcel, name="retire weights")

    async def _retire(self, parcel: Parcel) -> None:
        # Where it fails the server has lost it anyway, or keeps what nobody asks for.
        with suppress(ServerGone, ServerRefused):
            await self._handover.retire(parcel, self.client, deadline_s=PAUSE_DEADLINE_S)
        self._lent.discard(parcel)

    async def leave(self) -> None:
        """After its last request: a server that goes on without us drops what it was given."""
        if self._ours:
            return
        with anyio.move_on_after(LEAVE_S):
            for parcel in tuple(self._lent):
                await self._retire(parcel)

    async def _replace(self, parcel: Parcel) -> float:
        client, flush = self.client, self._settings.swap != "in_place"
        trouble = f"version {parcel.version} took it too long"
        self.keeper.busy, self.taking = True, parcel
        try:
            await self._handover.meet(client)
            began = time.monotonic()
            await client.pause(self._settings.swap, deadline_s=PAUSE_DEADLINE_S)
            await self._handover.deliver(parcel, client, flush=flush, deadline_s=SWAP_DEADLINE_S)
            await self._attest(parcel)
            self.holds = parcel
        except (ServerGone, ServerRefused) as error:
            trouble = str(error)
            raise
        finally:
            if self.holds is not parcel:
                self._condemn(trouble)  # before it goes on: nothing is to be sampled with weights that are in doubt
            self.keeper.busy, self.taking = False, None
            await self._resume()
        pause_s = time.monotonic() - began
        log.info("server took weights", server=self.name, version=parcel.version, pause_s=round(pause_s, 6))
        return pause_s

    def _condemn(self, reason: str) -> None:
        self.holds = None
        self.keeper.condemn(reason)

    async def _resume(self) -> None:
        with anyio.CancelScope(shield=True):
            try:
                await self.client.resume(deadline_s=PAUSE_DEADLINE_S)
            except (ServerGone, ServerRefused) as error:
                self._condemn(f"it does not go on after a swap: {error}")
                raise

    async def _attest(self, parcel: Parcel) -> None:
        """Compare the checksums of the server's ranks with what they must be."""
        if parcel.checksums is None:
            return
        for reported in await self.client.checksums(deadline_s=SWAP_DEADLINE_S):
            if reported.ranks != len(parcel.checksums):
                raise ServerRefused(f"it has {reported.ranks} tensor-parallel ranks; set actor.engine.tensor_parallel")
            try:
                name = first_difference(parcel.checksums[reported.rank], reported.checksums, self._layout)
            except ValueError as error:
                raise ServerRefused(f"its weights cannot be checked: {error}") from error
            if name is not None:
                where = f"the server's {name} on rank {reported.rank}"
                raise ServerRefused(f"after loading, {where} is not that of version {parcel.version}")
