"""The engine that drives SGLang servers: token-exact requests over HTTP, weights swapped underneath, restarts
survived.

What becomes of running requests at a swap is `actor.engine.swap`: `retract` (the default) recomputes their prompt with
the new weights, `in_place` lets them go on with the keys and values they have, `abort` ends them and this engine
resubmits them from their tokens. Every token keeps the version and the log-probability it was drawn with.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final, Self

import anyio

from actors.engines.engine import EngineFailure, EngineHealth, Generation, LoadReport, check_prompt
from actors.engines.sglang.adapters import AdapterHandover
from actors.engines.sglang.collective import CollectiveHandover
from actors.engines.sglang.fleet import Fleet
from actors.engines.sglang.handover import DiskHandover, Handover, Parcel
from actors.engines.sglang.launch import check_context
from actors.engines.sglang.members import Members
from actors.engines.sglang.model import ModelFacts, read_facts
from actors.engines.sglang.progress import Progress
from matpo.config import Lora, Sampling
from matpo.config import SglangEngine as Settings
from protocols.records import Tokens
from protocols.weights import Weights

MOST_BREAKS: Final = 5
"""Of one call's requests: one that breaks every server it meets must not bring down all of them."""


class SglangEngine:
    """Implements `actors.engines.engine.Engine`: checks requests, and has the fleet sample them and take weights."""

    def __init__(self, facts: ModelFacts, settings: Settings, handover: Handover) -> None:
        self.fleet = Fleet()
        self._facts = facts
        self._settings = settings
        self._handover = handover
        self._newest: Parcel | None = None
        self._version = -1
        self._digests: dict[int, str] = {}
        self._loading = anyio.Lock()
        self._waiting = 0

    @classmethod
    @asynccontextmanager
    async def open(
        cls, folder: Path, settings: Settings, *, lora: Lora | None = None, seed: int, log: Path | None = None
    ) -> AsyncIterator[Self]:
        """Start servers on the model of `folder`, or find those at `urls` or behind `router`; weights come with the
        first `load`.

        What server i prints goes to `log` with "-i" before its suffix (default: a temporary file, kept when a server
        does not start).
        Raises `UserError` for a model or a server that cannot be used.
        """
        facts = read_facts(folder)
        check_context(folder, settings)
        with _output(log) as output:
            async with _handover(settings, facts, lora, log=output) as handover:
                engine = cls(facts, settings, handover)
                members = Members(
                    engine.fleet,
                    facts,
                    settings,
                    handover=handover,
                    lora=lora,
                    newest=lambda: engine._newest,
                    seed=seed,
                    log=output,
                )
                async with members.present():
                    yield engine

    @property
    def version(self) -> int:
        """The lowest version among usable servers; -1 before the first `load`."""
        held = [server.version for server in self.fleet.usable]
        return min(held) if held else self._version

    @property
    def digests(self) -> Mapping[int, str]:
        """Of all weights handed over; with `attest`, a server's own checksums agreed before it sampled with them."""
        return self._digests

    async def generate(
        self, tokens: Tokens, sampling: Sampling, *, deadline_s: float, group: str = "", adapter: str | None = ""
    ) -> Generation:
        """Sample a continuation; see `Engine.generate`. Also raises `ValueError` for a prompt that fills the context.

        When a server dies or freezes in between, sampling goes on from the tokens that had arrived: on another one at
        once, or on the same one when it is back. `group` goes to one server as far as load allows.
        """
        check_prompt(tokens, vocabulary=self._facts.vocabulary, context=self._settings.max_context_tokens)
        progress = Progress(tokens, adapter)
        self._waiting += 1
        try:
            with anyio.move_on_after(deadline_s):
                while progress.breaks < MOST_BREAKS:
                    place = await self.fleet.pick(group)
                    stop = await place.attempt(progress, sampling, group=group)
                    if stop is not None:
                        return progress.generation(stop)
                raise EngineFailure(f"{progress.breaks} sglang servers in a row broke a request: {progress.trouble}")
        finally:
            self._waiting -= 1
        raise EngineFailure(
            f"no answer of the sglang engine within {deadline_s:g} s ({self.fleet.description}; {self.fleet.running}"
            f" running, {self._waiting} waiting); lower actor.concurrency or raise actor.generate_timeout_s"
        )

    async def load(self, weights: Weights, *, version: int, file: Path | None = None) -> LoadReport:
        """Hand the weights over, pause, load, compare checksums, resume; all servers at the same time.

        Raises `ValueError` when the tensors do not fit the model; the old weights then stay. Raises `EngineFailure`
        when no server takes them. Those that do not are brought up to date before they are used again.
        """
        self._handover.check(weights)
        async with self._loading:
            try:
                parcel = await self._handover.prepare(weights, version=version, file=file)
            except OSError as error:
                raise EngineFailure(f"version {version} could not be handed over: {error}") from error
            self._newest = parcel
            self._digests[version] = parcel.digest
            pause_s = await self.fleet.deliver(parcel)
            self._handover.keep_only(parcel, *self.fleet.parcels)
            self._version = version
        return LoadReport(version=version, digest=parcel.digest, pause_s=pause_s)

    async def health(self) -> EngineHealth:
        """Requests under way as this engine counts them, and each server's state as last seen."""
        states = {server.keeper.state for server in self.fleet.servers.values()}
        ready, failed = bool(self.fleet.usable), states <= {"failed", "silent"}
        running = self.fleet.running
        return EngineHealth(
            state="ready" if ready else "failed" if failed else "starting",
            detail=self.fleet.description,
            running=running,
            waiting=self._waiting - running,
            sampled_tokens=self.fleet.counts.sampled,
            prompt_tokens=self.fleet.counts.prompted,
            cached_tokens=self.fleet.counts.cached,
            silent=tuple(
                name for name, server in self.fleet.servers.items() if server.keeper.state in ("silent", "failed")
            ),
        )


def _handover(
    settings: Settings, facts: ModelFacts, lora: Lora | None, *, log: Path
) -> AbstractAsyncContextManager[Handover]:
    if lora is not None:
        return AdapterHandover.open(settings, facts, lora)
    if settings.handover == "collective":
        return CollectiveHandover.open(settings, facts, log_file=log)
    return DiskHandover.open(settings, facts)


@contextmanager
def _output(log: Path | None) -> Iterator[Path]:
    """`log`, or a temporary file that outlives the block only if it was written and an error ends the block."""
    if log is not None:
        yield log
        return
    folder = Path(tempfile.mkdtemp(prefix="matpo-sglang-"))
    failed = True
    try:
        yield folder / "engine.log"
        failed = False
    finally:
        if not (failed and any(folder.iterdir())):
            shutil.rmtree(folder)
