"""One embedded engine for every adapter that plays a role: each has the model's weights with its adapter added in."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from actors.engines.embedded.engine import EmbeddedEngine
from actors.engines.engine import Engine, EngineHealth, Generation, LoadReport
from matpo.config import EmbeddedEngine as Settings
from matpo.config import Lora, Sampling
from protocols.records import Tokens
from protocols.weights import Weights


class Players:
    """Implements `actors.engines.engine.Engine`. Every player has its own batch and its own cache of prompts."""

    def __init__(self, engines: Mapping[str | None, EmbeddedEngine]) -> None:
        self._engines = engines
        self._first = next(iter(engines.values()))

    @classmethod
    @asynccontextmanager
    async def open(
        cls, folder: Path, settings: Settings, *, lora: Lora | None = None, seed: int, log: Path | None = None
    ) -> AsyncIterator[Engine]:
        """A single engine where there is a single player; see `EmbeddedEngine.open`. `log` is for engines that are
        processes of their own; these print nothing."""
        names = ("",) if lora is None else lora.players
        async with AsyncExitStack() as stack:
            engines = {
                name: await stack.enter_async_context(
                    EmbeddedEngine.open(folder, settings, lora=lora, player=name, seed=seed + number)
                )
                for number, name in enumerate(names)
            }
            yield cls(engines) if len(engines) > 1 else engines[names[0]]

    @property
    def version(self) -> int:
        """The lowest version among the players; -1 before the first `load`."""
        return min(engine.version for engine in self._engines.values())

    @property
    def digests(self) -> Mapping[int, str]:
        """Of all adapters together; the first player takes every version first."""
        return self._first.digests

    async def generate(
        self, tokens: Tokens, sampling: Sampling, *, deadline_s: float, group: str = "", adapter: str | None = ""
    ) -> Generation:
        """See `Engine.generate`."""
        return await self._engines[adapter].generate(tokens, sampling, deadline_s=deadline_s, group=group)

    async def load(self, weights: Weights, *, version: int, file: Path | None = None) -> LoadReport:
        """One player after the other; see `EmbeddedEngine.load`."""
        reports = [await engine.load(weights, version=version, file=file) for engine in self._engines.values()]
        return LoadReport(version, reports[0].digest, max(report.pause_s for report in reports))

    async def health(self) -> EngineHealth:
        """All players together; the detail is that of the one in the worst state."""
        parts = [await engine.health() for engine in self._engines.values()]
        worst = min(parts, key=lambda part: ("failed", "starting", "ready").index(part.state))
        return EngineHealth(
            state=worst.state,
            detail=worst.detail,
            running=sum(part.running for part in parts),
            waiting=sum(part.waiting for part in parts),
            sampled_tokens=sum(part.sampled_tokens for part in parts),
            prompt_tokens=sum(part.prompt_tokens for part in parts),
            cached_tokens=sum(part.cached_tokens for part in parts),
        )
