"""Weights reach the engine whole and checked, whatever happens on the way."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from matpo.errors import UserError
from protocols.messages import WeightsLoaded
from protocols.weights import read_keyframe, weights_digest
from tests.actors.weights.parts import Shelf, following
from tests.disk import full_disk


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


async def test_weights_of_another_learner_under_the_same_number_are_no_base(tmp_path: Path) -> None:
    async with following(tmp_path) as (shelf, hub, engine, follower):
        follower.announce(shelf.publish(5, delta=False))
        await hub.wait_reports(1)
        (tmp_path / "other").mkdir()
        other = Shelf(tmp_path / "other", first_row=7.0)  # another run of this name, also at version 5
        hub.shelf = other
        hub.asked.clear()
        ready = other.publish(6, delta=True)
        follower.announce(ready)
        await hub.wait_failure("broken")
        follower.announce(ready)
        await hub.wait_reports(2)
        assert {request.name for request in hub.asked} == {"delta-6", "keyframe-6"}
        assert engine.digests[6] == ready.digest and follower.failures == {"broken": 1}


async def test_the_engine_gets_the_file_its_weights_are_mapped_from(tmp_path: Path) -> None:
    async with following(tmp_path) as (shelf, hub, engine, follower):
        follower.announce(shelf.publish(0, delta=False))
        await hub.wait_reports(1)
        follower.announce(shelf.publish(1, delta=True))
        await hub.wait_reports(2)
        assert engine.file is not None
        assert weights_digest(read_keyframe(engine.file)) == engine.digests[1]


async def test_no_room_for_the_weights_ends_the_actor_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with following(tmp_path) as (shelf, _, _, follower):
            ready = shelf.publish(0, delta=False)
            with full_disk(above_bytes=4096):
                follower.announce(ready)
                await anyio.sleep_forever()
    assert caught.group_contains(UserError, match=r"set actor\.weights\.memory")
