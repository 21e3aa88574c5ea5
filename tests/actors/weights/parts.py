"""A shelf of weight files, a hub that hands them out, an engine that holds what it was given."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.lowlevel
import numpy as np

from actors.engines.engine import EngineHealth, Generation, LoadReport
from actors.weights.follow import Follower
from actors.weights.shadow import Shadow
from actors.weights.sources import HubSource, Source, Sources
from matpo.config import Sampling
from protocols.delta import write_delta
from protocols.messages import Chunk, ChunkRequest, Refuse, WeightObject, WeightsLoaded, WeightsReady
from protocols.records import Tokens
from protocols.weights import Tensor, Weights, weights_digest, write_keyframe

ROWS = 300


def weights_at(version: int, *, first_row: float = 0.0) -> Weights:
    """Weights that change in one row per version."""
    data = np.arange(ROWS * 10, dtype=np.float32).reshape(ROWS, 10).copy()
    data[0] += first_row
    for row in range(version):
        data[row] += 1.0
    return {"w": Tensor("float32", data)}


class Shelf:
    """The weight store of a hub: files by name."""

    def __init__(self, folder: Path, *, first_row: float = 0.0) -> None:
        self.folder = folder
        self.first_row = first_row

    def publish(self, version: int, *, delta: bool) -> WeightsReady:
        target = weights_at(version, first_row=self.first_row)
        objects: list[WeightObject] = []
        if delta:
            path = self.folder / f"delta-{version}"
            base = weights_at(version - 1, first_row=self.first_row)
            objects.append(write_delta(path, base, target, base_version=version - 1, version=version))
        objects.append(write_keyframe(self.folder / f"keyframe-{version}", target, version=version))
        return WeightsReady(version=version, digest=weights_digest(target), objects=tuple(objects))

    def spoil(self, name: str) -> None:
        path = self.folder / name
        content = bytearray(path.read_bytes())
        content[-1] ^= 0xFF
        path.write_bytes(bytes(content))


class HoldingEngine:
    """Holds weights, samples nothing."""

    def __init__(self) -> None:
        self.version = -1
        self.digests: dict[int, str] = {}
        self.loaded: list[int] = []
        self.file: Path | None = None
        self.refuses = False
        self.loading = anyio.Event()
        self.gate: anyio.Event | None = None
        """Loading waits for it."""

    async def generate(
        self, tokens: Tokens, sampling: Sampling, *, deadline_s: float, group: str = "", adapter: str | None = ""
    ) -> Generation:
        raise NotImplementedError

    async def load(self, weights: Weights, *, version: int, file: Path | None = None) -> LoadReport:
        self.loading.set()
        if self.gate is not None:
            await self.gate.wait()
        if self.refuses:
            raise ValueError("weights do not fit the model: missing ['v']")
        self.version, self.digests[version] = version, weights_digest(weights)
        self.loaded.append(version)
        self.file = file
        return LoadReport(version=version, digest=self.digests[version], pause_s=0.25)

    async def health(self) -> EngineHealth:
        raise NotImplementedError


class Hub:
    """Answers chunk requests from a shelf, or holds them back."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self.follower: Follower | None = None
        self.asked: list[ChunkRequest] = []
        self.reports: list[WeightsLoaded] = []
        self.reported = anyio.Event()
        self.silent_about: set[int] = set()
        """Positions in `asked` that get no answer."""
        self.gone: set[str] = set()

    async def send(self, message: ChunkRequest | WeightsLoaded) -> bool:
        assert self.follower is not None
        if isinstance(message, WeightsLoaded):
            self.reports.append(message)
            self.reported.set()
            self.reported = anyio.Event()
        elif message.name in self.gone:
            self.follower.refuse(Refuse(reason="unknown_object", detail="retired", about=message.name))
        else:
            self.asked.append(message)
            if len(self.asked) - 1 not in self.silent_about:
                content = (self.shelf.folder / message.name).read_bytes()
                part = content[message.offset : message.offset + message.size_bytes]
                self.follower.take(Chunk(name=message.name, offset=message.offset), memoryview(part))
        return True

    async def wait_connected(self) -> None:
        raise AssertionError("never away")

    async def wait_failure(self, kind: str) -> None:
        assert self.follower is not None
        while not self.follower.failures[kind]:
            await anyio.lowlevel.checkpoint()

    async def wait_reports(self, count: int) -> None:
        while len(self.reports) < count:
            await self.reported.wait()


@asynccontextmanager
async def following(
    tmp_path: Path, *, patience_s: float = 5.0, others: Sequence[Source] = ()
) -> AsyncIterator[tuple[Shelf, Hub, HoldingEngine, Follower]]:
    """Chunks have 1 kB: a keyframe of 12 kB is then 12 chunks."""
    shelf, engine = Shelf(tmp_path), HoldingEngine()
    hub = Hub(shelf)
    with Shadow.open("test", memory=tmp_path) as shadow, anyio.fail_after(20):
        source = HubSource(hub, patience_s=patience_s, chunk_bytes=1024)
        follower = hub.follower = Follower(shadow, engine=engine, sources=Sources(source, others), reports=hub)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(follower.run)
            yield shelf, hub, engine, follower
            tasks.cancel_scope.cancel()
