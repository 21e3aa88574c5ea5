"""One SGLang server: its requests, the weights it holds, and giving it new ones."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from contextlib import aclosing
from typing import Final

import anyio

from actors.engines.engine import EngineFailure
from actors.engines.sglang.answers import BadAnswer, parse_answer
from actors.engines.sglang.client import Request, ServerGone, ServerRefused, SglangClient
from actors.engines.sglang.handover import Handover, Parcel, first_difference
from actors.engines.sglang.keeper import Keeper, Launch
from actors.engines.sglang.model import ModelFacts
from actors.engines.sglang.progress import Progress, Reply
from matpo.config import Sampling
from matpo.config import SglangEngine as Settings
from protocols.records import StopReason

SWAP_DEADLINE_S: Final = 300.0
"""For each request of a swap; loading a large model from disk takes minutes."""


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
        launch: Launch | None,
        newest: Callable[[], Parcel | None],
    ) -> None:
        """`launch`: starts it; None: it is somebody else's. `newest`: the weights every server ought to hold."""
        self.name = name
        self.client = client
        self.keeper = Keeper(client, launch, restore=self.restore, start_timeout_s=settings.start_timeout_s)
        self.holds: Parcel | None = None
        """The weights it samples with; None: those it was started with, which nobody announced."""
        self.running = self.sampled = self.prompted = self.cached = 0
        self._facts = facts
        self._settings = settings
        self._handover = handover
        self._newest = newest
        self._swap = anyio.Lock()
        self._swaps = 0
        self._cache_key = ""
        """New after every swap, so that no keys and values of other weights are ever reused."""

    @property
    def usable(self) -> bool:
        """Whether requests may be sent."""
        return self.keeper.state == "ready" and self.holds is not None

    async def attempt(self, progress: Progress, sampling: Sampling) -> StopReason | None:
        """One request. Returns why sampling is over, or None when another request must go on from `progress`.

        Raises `EngineFailure` when the server refuses, or answers what it should not.
        """
        room = self._settings.max_context_tokens - len(progress.whole)
        left = sampling.max_tokens - progress.count
        request = Request(
            rid=uuid.uuid4().hex,
            tokens=progress.whole,
            sampling=sampling,
            max_tokens=min(room, left),
            ends=self._facts.ends,
            cache_key=self._cache_key,
            stream_tokens=self._settings.stream_tokens,
        )
        sent_with = -1 if self.holds is None else self.holds.version
        swaps, reply, answered = self._swaps, Reply(sent_with=sent_with), False
        self.running += 1
        try:
            await self._receive(request, reply)
            reply.finish(progress)
            answered = True
        except ServerGone as error:
            answered = True
            reply.salvage(progress)
            self.keeper.suspect(str(error))
            return self._stop_of(progress, sampling)
        except (ServerRefused, BadAnswer) as error:
            raise EngineFailure(f"sglang: {error}") from error
        finally:
            self.running -= 1
            if not answered:
                await self.client.abort(request.rid)
        match reply.last.finish:
            case "stop":
                return "stop"
            case "length":
                return "length" if left <= room else "context"
        if swaps == self._swaps and not self._swap.locked():
            raise EngineFailure(f"sglang aborted the request: {reply.last.detail}")
        return self._stop_of(progress, sampling)

    async def take(self, parcel: Parcel) -> float:
        """Swap the weights. Returns how long nothing was sampled, in seconds.

        Raises `ServerGone` or `ServerRefused` when that fails; the keeper then replaces the server, or tries again.
        """
        async with self._swap:
            if self.holds is parcel:
                return 0.0
            try:
                return await self._push(parcel)
            except (ServerGone, ServerRefused) as error:
                self.holds = None
                self.keeper.condemn(str(error))
                raise

    async def restore(self, *, fresh: bool) -> None:
        """Bring the server up to date; a `fresh` one holds nothing of ours."""
        if fresh:
            self.holds = None
        while (parcel := self._newest()) is not None and parcel is not self.holds:
            async with self._swap:
                await self._push(parcel)

    async def _receive(self, request: Request, reply: Reply) -> None:
        async with aclosing(self.client.generate(request)) as contents:
            async for content in contents:
                before = reply.count
                reply.take(parse_answer(content, filtered=request.filtered))
                self.sampled += reply.count - before
        if reply.last.finish is None:
            raise ServerGone("the reply ended before the answer did")
        self.prompted += len(request.tokens)
        self.cached += reply.last.cached

    async def _push(self, parcel: Parcel) -> float:
        client, began = self.client, time.monotonic()
        flush = self._settings.swap != "in_place"
        self.keeper.busy = True
        try:
            await client.pause(self._settings.swap, deadline_s=SWAP_DEADLINE_S)
            await self._handover.deliver(parcel, client, flush=flush, deadline_s=SWAP_DEADLINE_S)
            await self._attest(parcel)
            self._swaps += 1
            self._cache_key = uuid.uuid4().hex
            self.holds = parcel
        finally:
            self.keeper.busy = False
            with anyio.CancelScope(shield=True):
                await client.resume(deadline_s=SWAP_DEADLINE_S)
        return time.monotonic() - began

    async def _attest(self, parcel: Parcel) -> None:
        """Compare the server's own checksums with what they must be."""
        if parcel.checksums is None:
            return
        for reported in await self.client.checksums(deadline_s=SWAP_DEADLINE_S):
            name = first_difference(parcel.checksums, reported, tied=self._facts.tied)
            if name is not None:
                raise ServerRefused(f"after loading, the server's {name} is not that of version {parcel.version}")

    def _stop_of(self, progress: Progress, sampling: Sampling) -> StopReason | None:
        """Whether what was saved of a broken request is the whole answer already."""
        if progress.count and int(progress.whole[-1]) in self._facts.ends:
            return "stop"
        if progress.count >= sampling.max_tokens:
            return "length"
        return "context" if len(progress.whole) >= self._settings.max_context_tokens else None
