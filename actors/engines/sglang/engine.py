"""The engine that drives SGLang servers: token-exact requests over HTTP, weights swapped underneath, restarts
survived.

What becomes of running requests at a swap is `actor.engine.swap`: `retract` (the default) recomputes their prompt with
the new weights, `in_place` lets them go on with the keys and values they have, `abort` ends them and this engine
resubmits them from their tokens. Every token keeps the version and the log-probability it was drawn with.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Self

import anyio
import anyio.abc

from actors.engines.engine import EngineFailure, EngineHealth, Generation, LoadReport
from actors.engines.sglang.client import ServerGone, ServerRefused, SglangClient
from actors.engines.sglang.handover import DiskHandover, Handover, Parcel
from actors.engines.sglang.keeper import Launch, ServerDied
from actors.engines.sglang.launch import check_context, free_port, last_words, launched
from actors.engines.sglang.model import ModelFacts, read_facts
from actors.engines.sglang.progress import Progress
from actors.engines.sglang.server import SWAP_DEADLINE_S, Server
from matpo.config import Sampling
from matpo.config import SglangEngine as Settings
from matpo.errors import UserError
from protocols.records import Tokens
from protocols.weights import Weights


class SglangEngine:
    """Implements `actors.engines.engine.Engine`: checks requests, picks servers, hands all of them new weights."""

    def __init__(self, facts: ModelFacts, settings: Settings, handover: Handover) -> None:
        self.servers: Sequence[Server] = ()
        self._facts = facts
        self._settings = settings
        self._handover = handover
        self._newest: Parcel | None = None
        self._version = -1
        self._digests: dict[int, str] = {}
        self._loaded = anyio.Event()
        self._loading = anyio.Lock()
        self._waiting = 0

    @classmethod
    @asynccontextmanager
    async def open(cls, folder: Path, settings: Settings, *, seed: int, log: Path | None = None) -> AsyncIterator[Self]:
        """Start a server on the model of `folder`, or find the one at `url`; weights come with the first `load`.

        `log` receives what the server prints (default: a file in the system's temporary folder). Raises `UserError`
        for a model or a server that cannot be used.
        """
        facts = read_facts(folder)
        check_context(folder, settings)
        output = log or Path(tempfile.gettempdir()) / f"matpo-sglang-{os.getpid()}.log"
        async with AsyncExitStack() as stack:
            handover = await stack.enter_async_context(DiskHandover.open(settings, facts))
            engine = cls(facts, settings, handover)
            client = await stack.enter_async_context(SglangClient.open(settings.url or ""))
            launch = None if settings.url else _launcher(client, folder, settings, seed=seed, log=output)
            server = Server(
                "0",
                client,
                facts=facts,
                settings=settings,
                handover=handover,
                launch=launch,
                newest=lambda: engine._newest,
            )
            engine.servers = (server,)
            unusable: UserError | None = None
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(server.keeper.run, name="sglang server")
                try:
                    await server.keeper.wait_started()
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
    def digests(self) -> Mapping[int, str]:
        """Of all weights handed over; with `attest`, a server's own checksums agreed before it sampled with them."""
        return self._digests

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
                    server = await self._server()
                    stop = await server.attempt(progress, sampling)
                    if stop is not None:
                        return progress.generation(stop)
        finally:
            self._waiting -= 1
        raise EngineFailure(
            f"no answer of the sglang engine within {deadline_s:g} s ({self._state()}; {self._running()} running,"
            f" {self._waiting} waiting); lower actor.concurrency or raise actor.generate_timeout_s"
        )

    async def load(self, weights: Weights, *, version: int, file: Path | None = None) -> LoadReport:
        """Hand the weights over, pause, load, compare checksums, resume; to all servers at the same time.

        Raises `ValueError` when the tensors do not fit the model; the old weights then stay. Raises `EngineFailure`
        when no server takes them.
        """
        self._facts.check(weights)
        async with self._loading:
            try:
                parcel = await self._handover.prepare(weights, version=version, file=file)
            except OSError as error:
                raise EngineFailure(f"version {version} could not be handed over: {error}") from error
            before, self._newest = self._newest, parcel
            self._digests[version] = parcel.digest
            pause_s = await self._deliver(parcel)
            self._handover.keep_only(*(p for p in (parcel, before) if p is not None))
            self._version = version
            self._loaded.set()
        return LoadReport(version=version, digest=parcel.digest, pause_s=pause_s)

    async def health(self) -> EngineHealth:
        """Requests under way as this engine counts them, and the servers' state as last seen."""
        states = [server.keeper.state for server in self.servers]
        state = "ready" if any(server.usable for server in self.servers) else states[0]
        return EngineHealth(
            state="starting" if state == "ready" and self._version < 0 else state,
            detail=self._state(),
            running=self._running(),
            waiting=self._waiting - self._running(),
            sampled_tokens=sum(server.sampled for server in self.servers),
            prompt_tokens=sum(server.prompted for server in self.servers),
            cached_tokens=sum(server.cached for server in self.servers),
        )

    def _state(self) -> str:
        return "; ".join(
            f"server {s.name} at {s.client.url}, version {-1 if s.holds is None else s.holds.version}:"
            f" {s.keeper.state}, {s.keeper.detail}"
            for s in self.servers
        )

    def _running(self) -> int:
        return sum(server.running for server in self.servers)

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

    async def _server(self) -> Server:
        """One that may be used; waits for it."""
        await self._loaded.wait()
        server = self.servers[0]
        await server.keeper.wait_ready()
        return server

    async def _deliver(self, parcel: Parcel) -> float:
        """Give the weights to every server that is up; the others get them from their keepers before they are used.

        Returns the longest pause in seconds. Raises `EngineFailure` when none took them.
        """
        with anyio.move_on_after(SWAP_DEADLINE_S) as waiting:
            await self.servers[0].keeper.wait_ready()
        if waiting.cancelled_caught:
            raise EngineFailure(f"no sglang server was ready for weights: {self._state()}")
        pauses: list[float] = []
        refusals: list[str] = []

        async def give(server: Server) -> None:
            try:
                pauses.append(await server.take(parcel))
            except (ServerGone, ServerRefused) as error:
                refusals.append(str(error))

        async with anyio.create_task_group() as tasks:
            for server in self.servers:
                tasks.start_soon(give, server)
        if not pauses:
            raise EngineFailure(f"no sglang server took version {parcel.version}: {'; '.join(refusals)}")
        return max(pauses)


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
