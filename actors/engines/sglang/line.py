"""A line to where tokens are sampled, a server's or a router's: its requests, what is left of broken ones, and how all
of them are interrupted."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass

import anyio

from actors.engines.engine import EngineFailure
from actors.engines.sglang.answers import BadAnswer, UnknownWeights, parse_answer
from actors.engines.sglang.client import Request, ServerGone, ServerRefused, SglangClient
from actors.engines.sglang.model import ModelFacts
from actors.engines.sglang.progress import Progress, Reply
from matpo.config import Sampling
from matpo.config import SglangEngine as Settings
from protocols.records import StopReason


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a request is sent with."""

    version: int
    """Of the weights in use; `UNVERSIONED` where that is not certain."""
    cache_key: str
    """Keys and values are shared only between requests with the same key."""
    routing_key: str = ""
    """A router sends requests of one key to one server."""
    adapter: str = ""
    """What is added to the server's weights; empty: nothing."""
    settled: bool = False
    """Whether all tokens are sampled with this version, whatever newer ones the server takes meanwhile."""


@dataclass(slots=True)
class Counts:
    """Of tokens, since the engine started."""

    sampled: int = 0
    prompted: int = 0
    """In prompts."""
    cached: int = 0
    """In prompts, with their keys and values still there."""


class Line:
    """Any number of requests at once."""

    def __init__(
        self,
        client: SglangClient,
        facts: ModelFacts,
        settings: Settings,
        *,
        counts: Counts,
        abort: Callable[[str], None],
        broken: Callable[[str], None],
    ) -> None:
        """`abort` ends the request of an id, some time soon. `broken` is told why a request broke."""
        self.client = client
        self.running = 0
        self._counts = counts
        self._facts = facts
        self._settings = settings
        self._abort = abort
        self._broken = broken
        self._scopes: set[anyio.CancelScope] = set()
        self._ended = anyio.Event()

    def interrupt(self) -> None:
        """End all requests; what is certain of them is kept, and they are to go on elsewhere."""
        for scope in self._scopes:
            scope.cancel()

    async def close(self) -> None:
        """Interrupt, and wait until all requests have ended."""
        self.interrupt()
        while self._scopes:
            self._ended = anyio.Event()
            await self._ended.wait()

    async def attempt(self, progress: Progress, sampling: Sampling, ticket: Ticket) -> StopReason | None:
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
            cache_key=ticket.cache_key,
            stream_tokens=self._settings.stream_tokens,
            adapter=ticket.adapter,
            routing_key=ticket.routing_key,
        )
        reply = Reply(sent_with=ticket.version, to_the_end=ticket.settled)
        if not await self._complete(request, reply, progress):
            reply.salvage(progress)
            return self._stop_of(progress, sampling)
        match reply.last.finish:
            case "stop":
                return "stop"
            case "length":
                return "length" if left <= room else "context"
        if not reply.count:
            progress.broken(f"sglang aborted the request: {reply.last.detail}")
        return self._stop_of(progress, sampling)

    async def _complete(self, request: Request, reply: Reply, progress: Progress) -> bool:
        """Whether the reply came whole; then its tokens are added to `progress`."""
        complete = gone = False
        scope = anyio.CancelScope()
        self.running += 1
        self._scopes.add(scope)
        try:
            with scope:
                await self._receive(request, reply)
                reply.finish(progress)
                complete = True
        except (ServerGone, UnknownWeights) as error:
            gone = True
            progress.broken(str(error))
            self._broken(str(error))
        except (ServerRefused, BadAnswer) as error:
            raise EngineFailure(f"sglang: {error}") from error
        finally:
            self._scopes.discard(scope)
            self._ended.set()
            self.running -= 1
            if not complete and not gone:
                self._abort(request.rid)
        return complete

    async def _receive(self, request: Request, reply: Reply) -> None:
        if request.stream_tokens:
            async with aclosing(self.client.stream(request)) as events:
                async for event in events:
                    self._take(event, request, reply)
        else:
            self._take(await self.client.answer(request), request, reply)
        if reply.last.finish is None:
            raise ServerGone("the reply ended before the answer did")
        self._counts.prompted += len(request.tokens)
        self._counts.cached += reply.last.cached

    def _take(self, content: bytes, request: Request, reply: Reply) -> None:
        before = reply.count
        reply.take(parse_answer(content, filtered=request.filtered))
        self._counts.sampled += reply.count - before

    def _stop_of(self, progress: Progress, sampling: Sampling) -> StopReason | None:
        """Whether what was saved of a broken request is the whole answer already."""
        if progress.count and int(progress.whole[-1]) in self._facts.ends:
            return "stop"
        if progress.count >= sampling.max_tokens:
            return "length"
        return "context" if len(progress.whole) >= self._settings.max_context_tokens else None
