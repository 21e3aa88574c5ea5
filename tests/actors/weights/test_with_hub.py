"""Following weights of a real hub over real sockets while things go wrong."""

from __future__ import annotations

from pathlib import Path

import anyio

from protocols.messages import WeightsReady
from protocols.records import version_of
from protocols.weights import weights_digest
from tests.actors.weights.parts import HoldingEngine
from tests.actors.weights.rig import CHUNK_BYTES, Actor, learner, weights_at

CHUNKS = -(-weights_at(0)["w"].data.nbytes // CHUNK_BYTES)
"""About as many as a keyframe has."""


def size_of(ready: WeightsReady, *kinds: str) -> int:
    return sum(item.size_bytes for item in ready.objects if item.kind in kinds)


async def test_a_late_joiner_pulls_one_keyframe_and_one_fold(tmp_path: Path) -> None:
    async with learner(tmp_path / "run") as run, anyio.create_task_group() as tasks:
        first = await run.publish(weights_at(0), step=0)
        for step in (1, 2, 3):
            last = await run.publish(weights_at(step), step=step)
        engine = HoldingEngine()
        actor = Actor("late", run.endpoint, engine, tmp_path / "a")
        tasks.start_soon(actor.run)
        await actor.wait_version(3)
        assert run.served_bytes == size_of(first, "keyframe") + size_of(last, "fold")
        assert engine.loaded == [3] and engine.digests[3] == weights_digest(weights_at(3))
        tasks.cancel_scope.cancel()


async def test_an_actor_that_stands_still_slows_nobody_and_catches_up(tmp_path: Path) -> None:
    async with learner(tmp_path / "run") as run, anyio.create_task_group() as tasks:
        await run.publish(weights_at(0), step=0)
        still = Actor("still", run.endpoint, HoldingEngine(), tmp_path / "a")
        engine = HoldingEngine()
        other = Actor("other", run.endpoint, engine, tmp_path / "b")
        tasks.start_soon(still.run)
        await still.wait_chunks(3)
        still.listening = anyio.Event()  # the next message is its last for now
        tasks.start_soon(other.run)
        for step in range(1, 4):
            await run.publish(weights_at(step), step=step)
            await other.wait_version(step)
        assert still.chunks < CHUNKS and still.failures == {}
        # Its object is retired meanwhile: three newer keyframes are kept.
        for step in range(4, 7):
            await run.publish(weights_at(step), step=step, whole=True)
        await other.wait_version(6)
        still.listening.set()
        await still.wait_version(6)
        assert still.failures == {"gone": 1} and other.failures == {}
        tasks.cancel_scope.cancel()


async def test_a_hub_restarted_in_the_middle_of_a_download_goes_on_serving_it(tmp_path: Path) -> None:
    async with learner(tmp_path / "run") as run, anyio.create_task_group() as tasks:
        ready = await run.publish(weights_at(0), step=0)
        engine = HoldingEngine()
        actor = Actor("a", run.endpoint, engine, tmp_path / "a")
        tasks.start_soon(actor.run)
        await actor.wait_chunks(3)
        await run.stop()
        assert engine.version == -1
        await run.start()
        await actor.wait_version(0)
        assert run.served_bytes < size_of(ready, "keyframe")  # what had arrived was kept
        assert engine.digests[0] == ready.digest and actor.failures == {}
        tasks.cancel_scope.cancel()


async def test_a_damaged_delta_is_answered_by_the_way_over_the_keyframe(tmp_path: Path) -> None:
    async with learner(tmp_path / "run") as run, anyio.create_task_group() as tasks:
        await run.publish(weights_at(0), step=0)
        engine = HoldingEngine()
        actor = Actor("a", run.endpoint, engine, tmp_path / "a")
        tasks.start_soon(actor.run)
        await actor.wait_version(0)
        await run.publish(weights_at(1), step=1)
        await actor.wait_version(1)
        ready = await run.publish(weights_at(2), step=2, spoil=True)
        await actor.wait_version(2)  # keyframe 0 and the fold since
        assert actor.failures == {"broken": 1}
        assert engine.loaded == [0, 1, 2] and engine.digests[2] == ready.digest
        await run.publish(weights_at(3), step=3)
        await actor.wait_version(3)
        assert actor.failures == {"broken": 1}
        tasks.cancel_scope.cancel()


async def test_a_tampered_keyframe_is_not_loaded_and_the_next_one_is(tmp_path: Path) -> None:
    async with learner(tmp_path / "run") as run, anyio.create_task_group() as tasks:
        ready = await run.publish(weights_at(0), step=0)
        path = run.folder.weights / ready.objects[-1].name
        content = bytearray(path.read_bytes())
        content[-1] ^= 1  # the last bit of a weight
        path.write_bytes(content)
        engine = HoldingEngine()
        actor = Actor("a", run.endpoint, engine, tmp_path / "a")
        tasks.start_soon(actor.run)
        while actor.follower is None or not actor.failures.get("broken"):
            await anyio.lowlevel.checkpoint()  # the follower counts, and tells nobody
        assert engine.loaded == []
        await run.publish(weights_at(1), step=1, whole=True)
        await actor.wait_version(1)
        assert engine.loaded == [1]
        tasks.cancel_scope.cancel()


async def test_a_weight_file_cut_short_under_the_hub_costs_nobody_but_its_readers(tmp_path: Path) -> None:
    async with learner(tmp_path / "run") as run, anyio.create_task_group() as tasks:
        ready = await run.publish(weights_at(0), step=0)
        name = ready.objects[-1].name
        first = Actor("first", run.endpoint, HoldingEngine(), tmp_path / "a")
        tasks.start_soon(first.run)
        await first.wait_version(0)
        with (run.folder.weights / name).open("r+b") as file:
            file.truncate(1000)
        assert run.hub is not None
        run.hub.weights.forget_read()
        late = Actor("late", run.endpoint, HoldingEngine(), tmp_path / "b")
        tasks.start_soon(late.run)
        while late.follower is None or not late.failures.get("gone"):
            await anyio.lowlevel.checkpoint()  # the follower counts, and tells nobody
        announced = run.hub.weights.announcement()
        assert announced is not None and announced.objects == (), "what cannot be served is not offered"
        await run.publish(weights_at(1), step=1, whole=True)
        for actor in (first, late):
            await actor.wait_version(1)
        tasks.cancel_scope.cancel()


async def test_a_learner_back_at_an_older_checkpoint_is_followed_into_its_lineage(tmp_path: Path) -> None:
    async with learner(tmp_path / "run") as run, anyio.create_task_group() as tasks:
        engine = HoldingEngine()
        actor = Actor("a", run.endpoint, engine, tmp_path / "a")
        tasks.start_soon(actor.run)
        for step in range(4):
            await run.publish(weights_at(step), step=step)
            await actor.wait_version(version_of(lineage=0, step=step))
        await run.begin()
        assert run.lineage == 1
        served = run.served_bytes
        restart = await run.publish(weights_at(50), step=2)  # other weights than step 2 had before
        await actor.wait_version(version_of(lineage=1, step=2))
        following = await run.publish(weights_at(51), step=3)
        await actor.wait_version(version_of(lineage=1, step=3))
        assert run.served_bytes - served == size_of(restart, "keyframe") + size_of(following, "delta")
        assert engine.digests[version_of(lineage=1, step=3)] == weights_digest(weights_at(51))
        assert actor.failures == {}
        tasks.cancel_scope.cancel()
