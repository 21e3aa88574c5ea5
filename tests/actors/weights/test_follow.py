"""Weights reach the engine whole and checked, whatever happens on the way."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import numpy as np
import pytest

from actors import follow
from actors.engines.engine import EngineHealth, Generation, LoadReport
from actors.follow import Follower
from matpo.config import Sampling
from matpo.errors import UserError
from protocols.delta import write_delta
from protocols.messages import Chunk, ChunkRequest, Refuse, WeightObject, WeightsLoaded, WeightsReady
from protocols.records import Tokens
from protocols.weights import Tensor, Weights, weights_digest, write_keyframe

ROWS = 300


def weights_at(version: int) -> Weights:
    """Weights that change in one row per version."""
    data = np.arange(ROWS * 10, dtype=np.float32).reshape(ROWS, 10).copy()
    for row in range(version):
        data[row] += 1.0
    return {"w": Tensor("float32", data)}


class Shelf:
    """The weight store of a hub: files by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def publish(self, version: int, *, delta: bool) -> WeightsReady:
        target = weights_at(version)
        objects: list[WeightObject] = []
        if delta:
            path = self.folder / f"delta-{version}"
            objects.append(
                write_delta(path, weights_at(version - 1), target, base_version=version - 1, version=version)
            )
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
        self.refuses = False

    async def generate(self, tokens: Tokens, sampling: Sampling, *, deadline_s: float, group: str = "") -> Generation:
        raise NotImplementedError

    async def load(self, weights: Weights, *, version: int, file: Path | None = None) -> LoadReport:
        if self.refuses:
            raise ValueError("weights do not fit the model: missing ['v']")
        self.version, self.digests[version] = version, weights_digest(weights)
        self.loaded.append(version)
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

    async def wait_reports(self, count: int) -> None:
        while len(self.reports) < count:
            await self.reported.wait()


@asynccontextmanager
async def following(
    tmp_path: Path, *, patience_s: float = 5.0
) -> AsyncIterator[tuple[Shelf, Hub, HoldingEngine, Follower]]:
    shelf, engine = Shelf(tmp_path), HoldingEngine()
    hub = Hub(shelf)
    follower = Follower(tmp_path / "incoming", engine=engine, uplink=hub, patience_s=patience_s)
    hub.follower = follower
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(follower.run)
            yield shelf, hub, engine, follower
            tasks.cancel_scope.cancel()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A keyframe of 12 kB is then 12 chunks."""
    monkeypatch.setattr(follow, "CHUNK_BYTES", 1024)


async def test_a_keyframe_arrives_in_chunks_and_then_deltas_suffice(tmp_path: Path) -> None:
    async with following(tmp_path) as (shelf, hub, engine, follower):
        first = shelf.publish(0, delta=False)
        follower.announce(first)
        await hub.wait_reports(1)
        assert len(hub.asked) == -(-first.objects[0].size_bytes // 1024) > 10
        hub.asked.clear()
        second = shelf.publish(1, delta=True)
        follower.announce(second)
        await hub.wait_reports(2)
        assert {request.name for request in hub.asked} == {"delta-1"}
        assert hub.reports[1] == WeightsLoaded(version=1, digest=second.digest, pause_s=0.25)
        assert engine.loaded == [0, 1] and not follower.failures


async def test_an_announcement_that_is_repeated_downloads_nothing(tmp_path: Path) -> None:
    async with following(tmp_path) as (shelf, hub, engine, follower):
        ready = shelf.publish(0, delta=False)
        follower.announce(ready)
        await hub.wait_reports(1)
        hub.asked.clear()
        follower.announce(ready)
        await anyio.wait_all_tasks_blocked()
        assert hub.asked == [] and engine.loaded == [0]


async def test_a_chunk_that_never_comes_is_asked_for_again(tmp_path: Path) -> None:
    async with following(tmp_path, patience_s=0.02) as (shelf, hub, engine, follower):
        hub.silent_about = {2, 5}
        follower.announce(shelf.publish(0, delta=False))
        await hub.wait_reports(1)
        offsets = [request.offset for request in hub.asked]
        assert engine.version == 0 and len(offsets) == len(set(offsets)) + 2


async def test_a_damaged_delta_falls_back_to_the_keyframe_and_is_counted(tmp_path: Path) -> None:
    async with following(tmp_path) as (shelf, hub, engine, follower):
        follower.announce(shelf.publish(0, delta=False))
        await hub.wait_reports(1)
        ready = shelf.publish(1, delta=True)
        shelf.spoil("delta-1")
        follower.announce(ready)
        await anyio.wait_all_tasks_blocked()
        assert engine.version == 0
        hub.asked.clear()
        follower.announce(ready)  # as every heartbeat's answer does
        await hub.wait_reports(2)
        assert {request.name for request in hub.asked} == {"keyframe-1"}
        assert engine.version == 1 and follower.failures == {"broken": 1}


async def test_a_newer_announcement_is_followed_once_the_object_under_way_is_in(tmp_path: Path) -> None:
    async with following(tmp_path) as (shelf, hub, engine, follower):
        follower.announce(shelf.publish(0, delta=False))
        await hub.wait_reports(1)
        shelf.publish(1, delta=True)
        third = shelf.publish(2, delta=True)
        follower.announce(shelf.publish(1, delta=True))
        follower.announce(third)
        await hub.wait_reports(2)
        assert engine.loaded[-1] == 2 and hub.reports[-1].digest == third.digest


async def test_an_object_the_hub_no_longer_has_is_given_up_until_the_next_announcement(tmp_path: Path) -> None:
    async with following(tmp_path) as (shelf, hub, engine, follower):
        hub.gone = {"keyframe-0"}
        follower.announce(shelf.publish(0, delta=False))
        await anyio.wait_all_tasks_blocked()
        assert engine.version == -1 and follower.failures == {"gone": 1}
        follower.announce(shelf.publish(5, delta=False))
        await hub.wait_reports(1)
        assert engine.version == 5


async def test_weights_of_another_model_end_the_actor_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with following(tmp_path) as (shelf, _, engine, follower):
            engine.refuses = True
            follower.announce(shelf.publish(0, delta=False))
            await anyio.sleep_forever()
    assert caught.group_contains(UserError, match=r"model\.path")
