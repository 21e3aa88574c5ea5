"""The engine that drives a SGLang server: token-exact requests over HTTP, weights swapped underneath, restarts
survived.

What becomes of running requests at a swap is `actor.engine.swap`: `retract` (the default) recomputes their prompt with
the new weights, `in_place` lets them go on with the keys and values they have, `abort` ends them and this engine
resubmits them from their tokens. Every token keeps the version and the log-probability it was drawn with.
"""

from __future__ import annotations

import os
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import anyio
import anyio.abc
import anyio.to_thread

from actors.engines.engine import EngineFailure, EngineHealth, Generation, LoadReport
from actors.engines.sglang.answers import BadAnswer, parse_answer
from actors.engines.sglang.client import Request, ServerGone, ServerRefused, SglangClient
from actors.engines.sglang.handover import Handover, expected_checksums, first_difference
from actors.engines.sglang.keeper import Keeper, Launch, ServerDied
from actors.engines.sglang.launch import check_context, free_port, last_words, launched
from actors.engines.sglang.model import ModelFacts, read_facts
from actors.engines.sglang.progress import Progress, Reply
from matpo.config import Sampling
from matpo.config import SglangEngine as Settings
from matpo.errors import UserError
from protocols.records import StopReason, Tokens
from protocols.weights import Weights, weights_digest

SWAP_DEADLINE_S = 300.0
"""For each request of a swap; loading a large model from disk takes minutes."""


@dataclass(frozen=True, slots=True)
class _Held:
    """Weights the server has, or is about to get."""

    version: int
    digest: str
    folder: Path
    checksums: Mapping[str, str] | None
    """What the server must report; None: it is not asked."""


class SglangEngine:
    """Implements `actors.engines.engine.Engine` with one SGLang server."""

    def __init__(self, facts: ModelFacts, settings: Settings, client: SglangClient, handover: Handover) -> None:
        self._facts = facts
        self._settings = settings
        self._client = client
        self._handover = handover
        self._keeper: Keeper
        self._version, self._digest = -1, ""
        self._held: _Held | None = None
        self._loaded = anyio.Event()
        self._swap = anyio.Lock()
        self._swaps = 0
        self._cache_key = ""
        """New after every swap, so that no keys and values of other weights are ever reused."""
        self._running = self._waiting = self._sampled = 0

    @classmethod
    @asynccontextmanager
    async def open(cls, folder: Path, settings: Settings, *, seed: int, log: Path | None = None) -> AsyncIterator[Self]:
        """Start a server on the model of `folder`, or find the one at `url`; weights come with the first `load`.

        `log` receives what the server prints (default: a file in the system's temporary folder). Raises `UserError`
        for a model or a server that cannot be used.
        """
        facts = read_facts(folder)
        check_context(folder, settings)
        async with (
            SglangClient.open(settings.url or "") as client,
            Handover.open(settings.scratch, facts) as handover,
        ):
            engine = cls(facts, settings, client, handover)
            output = log or Path(tempfile.gettempdir()) / f"matpo-sglang-{os.getpid()}.log"
            launch = None if settings.url else _launcher(client, folder, settings, seed=seed, log=output)
            engine._keeper = Keeper(client, launch, restore=engine._restore, start_timeout_s=settings.start_timeout_s)
            unusable: UserError | None = None
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(engine._keeper.run, name="sglang server")
                try:
                    await engine._keeper.wait_started()
                except ServerDied as error:
                    unusable = _unusable(settings, output, reason=str(error))
                else:
                    yield engine
                tasks.cancel_scope.cancel()
            if unusable is not None:
                raise unusable

    @property
    def version(self) -> int:
        """Version of the weights in use; -1 before the first `load`."""
        return self._version

    @property
    def digest(self) -> str:
        """Digest of the weights in use; with `attest`, the server's own checksums agreed with it."""
        return self._digest

    async def generate(self, tokens: Tokens, sampling: Sampling, *, deadline_s: float, group: str = "") -> Generation:
        """Sample a continuation; see `Engine.generate`. Also raises `ValueError` for a prompt that fills the context.

        A server that dies in between is waited for, and sampling goes on from the tokens that had arrived.
        """
        self._check(tokens)
        progress = Progress(tokens)
        self._waiting += 1
        try:
            with anyio.move_on_after(deadline_s):
                while True:
                    await self._loaded.wait()
                    await self._keeper.wait_ready()
                    stop = await self._attempt(progress, sampling)
                    if stop is not None:
                        return progress.generation(stop)
        finally:
            self._waiting -= 1
        raise EngineFailure(
            f"no answer of the sglang engine within {deadline_s:g} s (server {self._keeper.state}:"
            f" {self._keeper.detail}; {self._running} running, {self._waiting} waiting); lower actor.concurrency or"
            " raise actor.generate_timeout_s"
        )

    async def load(self, weights: Weights, *, version: int, file: Path | None = None) -> LoadReport:
        """Hand the weights over as a file, pause, load, compare checksums, resume.

        Raises `ValueError` when the tensors do not fit the model; the old weights then stay. Raises `EngineFailure`
        when the server does not take them.
        """
        self._facts.check(weights)
        async with self._swap:
            held = await anyio.to_thread.run_sync(self._prepare, weights, version)
            with anyio.move_on_after(SWAP_DEADLINE_S) as waiting:
                await self._keeper.wait_ready()
            if waiting.cancelled_caught:
                raise EngineFailure(f"the sglang server was not ready for weights: {self._keeper.detail}")
            try:
                pause_s = await self._push(held)
            except (ServerGone, ServerRefused) as error:
                self._keeper.condemn(str(error))
                raise EngineFailure(f"the sglang server did not take version {version}: {error}") from error
            self._handover.keep_only(held.folder, self._held.folder if self._held else None)
            self._use(held)
        return LoadReport(version=version, digest=held.digest, pause_s=pause_s)

    async def health(self) -> EngineHealth:
        """Requests under way as this engine counts them, and the server's state as last seen."""
        state = self._keeper.state if self._version >= 0 or self._keeper.state == "failed" else "starting"
        return EngineHealth(
            state=state,
            detail=f"sglang at {self._client.url}, version {self._version}: {self._keeper.detail}",
            running=self._running,
            waiting=self._waiting - self._running,
            sampled_tokens=self._sampled,
        )

    def _check(self, tokens: Tokens) -> None:
        if not len(tokens):
            raise ValueError("the prompt is empty; give at least one token")
        low, high, vocabulary = int(tokens.min()), int(tokens.max()), self._facts.vocabulary
        if low < 0 or high >= vocabulary:
            raise ValueError(f"token {low if low < 0 else high} is outside the vocabulary of {vocabulary}")
        if len(tokens) >= self._settings.max_context_tokens:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens, the engine's context {self._settings.max_context_tokens}:"
                " nothing could be sampled; raise actor.engine.max_context_tokens or lower the roles' limits"
            )

    async def _attempt(self, progress: Progress, sampling: Sampling) -> StopReason | None:
        """One request. Returns why sampling is over, or None when another request must go on."""
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
        swaps, reply, answered = self._swaps, Reply(sent_with=self._version), False
        self._running += 1
        try:
            await self._receive(request, reply)
            reply.finish(progress)
            answered = True
        except ServerGone as error:
            answered = True
            reply.salvage(progress)
            self._keeper.suspect(str(error))
            return _stop_of(progress, sampling, self._settings, self._facts)
        except (ServerRefused, BadAnswer) as error:
            raise EngineFailure(f"sglang: {error}") from error
        finally:
            self._running -= 1
            if not answered:
                await self._client.abort(request.rid)
        match reply.last.finish:
            case "stop":
                return "stop"
            case "length":
                return "length" if left <= room else "context"
        if swaps == self._swaps and not self._swap.locked():
            raise EngineFailure(f"sglang aborted the request: {reply.last.detail}")
        return _stop_of(progress, sampling, self._settings, self._facts)

    async def _receive(self, request: Request, reply: Reply) -> None:
        async with aclosing(self._client.generate(request)) as contents:
            async for content in contents:
                before = reply.count
                reply.take(parse_answer(content, filtered=request.filtered))
                self._sampled += reply.count - before
        if reply.last.finish is None:
            raise ServerGone("the reply ended before the answer did")

    def _prepare(self, weights: Weights, version: int) -> _Held:
        folder = self._handover.write(weights, version=version)
        sums = (
            expected_checksums(weights, dtype=self._settings.dtype, tied=self._facts.tied)
            if self._settings.attested
            else None
        )
        return _Held(version, weights_digest(weights), folder, sums)

    async def _push(self, held: _Held) -> float:
        """Swap the server's weights. Returns how long nothing was sampled, in seconds."""
        client, began = self._client, time.monotonic()
        self._keeper.busy = True
        try:
            await client.pause(self._settings.swap, deadline_s=SWAP_DEADLINE_S)
            await client.update_from_disk(
                str(held.folder),
                version=held.version,
                flush=self._settings.swap != "in_place",
                deadline_s=SWAP_DEADLINE_S,
            )
            if held.checksums is not None:
                for reported in await client.checksums(deadline_s=SWAP_DEADLINE_S):
                    name = first_difference(held.checksums, reported, tied=self._facts.tied)
                    if name is not None:
                        raise ServerRefused(f"after loading, the server's {name} is not that of version {held.version}")
            self._swaps += 1
            self._cache_key = uuid.uuid4().hex
        finally:
            self._keeper.busy = False
            with anyio.CancelScope(shield=True):
                await client.resume(deadline_s=SWAP_DEADLINE_S)
        return time.monotonic() - began

    async def _restore(self) -> None:
        """Give a server that was restarted the weights the old one had."""
        if self._held is not None:
            await self._push(self._held)

    def _use(self, held: _Held) -> None:
        self._version, self._digest, self._held = held.version, held.digest, held
        self._loaded.set()


def _stop_of(progress: Progress, sampling: Sampling, settings: Settings, facts: ModelFacts) -> StopReason | None:
    """Whether what was saved of a broken request is the whole answer already."""
    if progress.count and int(progress.whole[-1]) in facts.ends:
        return "stop"
    if progress.count >= sampling.max_tokens:
        return "length"
    return "context" if len(progress.whole) >= settings.max_context_tokens else None


def _unusable(settings: Settings, output: Path, *, reason: str) -> UserError:
    if settings.url:
        return UserError(f"actor.engine.url {settings.url!r}: {reason}; start the server first")
    return UserError(f"sglang did not start: {reason}: {last_words(output)} (its log is {output})")


def _launcher(client: SglangClient, folder: Path, settings: Settings, *, seed: int, log: Path) -> Launch:
    """Starts servers, each on a free port, each sampling other random numbers."""

    def launch(attempt: int) -> AbstractAsyncContextManager[anyio.abc.Process]:
        port = free_port()
        client.url = f"http://127.0.0.1:{port}"
        return launched(folder, settings, port=port, seed=seed + attempt, log=log)

    return launch
