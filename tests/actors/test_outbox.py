"""Trees survive the actor, the hub and the network; each is delivered until it is acknowledged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import anyio
import pytest
from structlog.testing import capture_logs

from actors import outbox as module
from actors.outbox import WINDOW_TREES, Outbox
from matpo.errors import UserError
from protocols.channel import HubClient, HubSocket
from protocols.codec import decode_tree
from protocols.messages import Refuse, TreeUpload
from protocols.records import EpisodeTree
from tests.actors.trees import small_tree
from tests.counting import lines_run
from tests.disk import full_disk

PATIENCE_S = 10.0


def tree_files(folder: Path, suffix: str = "tree") -> list[str]:
    return sorted(path.name for path in folder.glob(f"*.{suffix}"))


def large_tree() -> EpisodeTree:
    """Of more than 64 KiB."""
    parts: dict[str, float | None] = {f"part {number}": 1.0 for number in range(6_000)}
    return replace(small_tree("large"), rewards=parts)


class Wire:
    """A hub's end that records uploads and can be away."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Sequence[bytes]]] = []
        self.up = anyio.Event()
        self.up.set()
        self.arrived = anyio.Event()

    async def send(self, message: TreeUpload, frames: Sequence[bytes] = ()) -> bool:
        if not self.up.is_set():
            return False
        self.sent.append((message.tree_id, frames))
        self.arrived.set()
        self.arrived = anyio.Event()
        return True

    async def wait_connected(self) -> None:
        await self.up.wait()

    async def wait_sent(self, count: int) -> None:
        with anyio.fail_after(PATIENCE_S):
            while len(self.sent) < count:
                await self.arrived.wait()


async def test_a_tree_goes_out_whole_and_its_file_goes_when_it_is_acknowledged(tmp_path: Path) -> None:
    wire = Wire()
    with Outbox.open(tmp_path, limit_trees=10) as outbox:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(outbox.upload, wire)
            outbox.put(small_tree("a"))
            await wire.wait_sent(1)
            assert decode_tree(wire.sent[0][1]).tree_id == "a"
            assert outbox.leases == {"lease-1"} and tree_files(tmp_path) == ["a.tree"]
            outbox.acknowledge("a")
            outbox.acknowledge("a")
            assert len(outbox) == 0 and tree_files(tmp_path) == []
            tasks.cancel_scope.cancel()


async def test_a_tree_the_disk_has_no_room_for_is_kept_in_memory_and_delivered(tmp_path: Path) -> None:
    wire = Wire()
    with Outbox.open(tmp_path, limit_trees=10) as outbox:
        with capture_logs() as logs, full_disk():
            outbox.put(small_tree("a"))
        assert [line["event"] for line in logs] == ["disk full, tree kept in memory"]
        assert outbox.full and len(outbox) == 1 and outbox.leases == {"lease-1"}
        assert tree_files(tmp_path) == [] == tree_files(tmp_path, "draft")
        outbox.put(small_tree("b"))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(outbox.upload, wire)
            await wire.wait_sent(2)
            assert [decode_tree(frames).tree_id for _, frames in wire.sent] == ["a", "b"]
            outbox.acknowledge("a")
            assert not outbox.full and tree_files(tmp_path) == ["b.tree"]
            tasks.cancel_scope.cancel()


async def test_trees_of_a_killed_actor_are_found_again_oldest_first_and_drafts_are_not(tmp_path: Path) -> None:
    with Outbox.open(tmp_path, limit_trees=10) as outbox:
        for name in ("b", "a", "c"):
            outbox.put(small_tree(name, lease_id=f"lease-{name}"))
    (tmp_path / "half.draft").write_bytes(b"half a tr")
    (tmp_path / "cut.tree").write_bytes(b"\x08\0\0\0cut")
    wire = Wire()
    with Outbox.open(tmp_path, limit_trees=10) as outbox:
        assert outbox.leases == {"lease-a", "lease-b", "lease-c"}
        assert outbox.dropped == {"malformed": 1}
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(outbox.upload, wire)
            await wire.wait_sent(3)
            tasks.cancel_scope.cancel()
    assert [name for name, _ in wire.sent] == ["b", "a", "c"]
    assert not (tmp_path / "half.draft").exists()


async def test_trees_wait_while_the_hub_is_away_and_go_again_to_one_that_was_restarted(tmp_path: Path) -> None:
    wire = Wire()
    wire.up = anyio.Event()
    with Outbox.open(tmp_path, limit_trees=10) as outbox:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(outbox.upload, wire)
            outbox.put(small_tree("a"))
            outbox.put(small_tree("b"))
            await anyio.wait_all_tasks_blocked()
            assert wire.sent == []
            wire.up.set()
            await wire.wait_sent(2)
            outbox.acknowledge("a")
            outbox.resend_all()
            await wire.wait_sent(3)
            tasks.cancel_scope.cancel()
    assert [name for name, _ in wire.sent] == ["a", "b", "b"]


async def test_a_tree_that_is_not_acknowledged_in_time_is_sent_again(tmp_path: Path) -> None:
    wire = Wire()
    with Outbox.open(tmp_path, limit_trees=10, resend_s=0.01) as outbox:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(outbox.upload, wire)
            outbox.put(small_tree("a"))
            await wire.wait_sent(3)
            tasks.cancel_scope.cancel()
    assert {name for name, _ in wire.sent} == {"a"}


async def test_only_so_many_trees_are_on_their_way_at_once(tmp_path: Path) -> None:
    wire = Wire()
    with Outbox.open(tmp_path, limit_trees=1000) as outbox:
        for number in range(WINDOW_TREES + 5):
            outbox.put(small_tree(f"{number:03d}"))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(outbox.upload, wire)
            await anyio.wait_all_tasks_blocked()
            assert len(wire.sent) == WINDOW_TREES
            outbox.acknowledge("000")
            await anyio.wait_all_tasks_blocked()
            assert len(wire.sent) == WINDOW_TREES + 1
            tasks.cancel_scope.cancel()


def test_a_full_outbox_says_so(tmp_path: Path) -> None:
    with Outbox.open(tmp_path, limit_trees=2) as outbox:
        outbox.put(small_tree("a"))
        assert not outbox.full
        outbox.put(small_tree("b"))
        assert outbox.full
        outbox.acknowledge("a")
        assert not outbox.full


def test_a_tree_the_hub_will_never_take_is_dropped_and_counted_others_stay(tmp_path: Path) -> None:
    with Outbox.open(tmp_path, limit_trees=10) as outbox:
        outbox.put(small_tree("a"))
        outbox.put(small_tree("b"))
        assert outbox.refuse(Refuse(reason="unknown_weights", detail="never published", about="a"))
        assert outbox.refuse(Refuse(reason="draining", detail="later", about="b"))
        assert not outbox.refuse(Refuse(reason="unknown_object", detail="gone", about="delta-3"))
        assert len(outbox) == 1 and outbox.dropped == {"unknown_weights": 1}


async def test_a_tree_too_large_for_the_hub_is_dropped_and_the_next_one_is_delivered(tmp_path: Path) -> None:
    async with (
        HubSocket.bind("tcp://127.0.0.1:0", max_message_bytes=2**16) as hub,
        HubClient.connect(hub.endpoint) as actor,
    ):
        with Outbox.open(tmp_path, limit_trees=10) as outbox, anyio.fail_after(PATIENCE_S):
            outbox.put(large_tree())
            outbox.put(small_tree("small"))
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(outbox.upload, actor)
                assert (await hub.receive()).message == TreeUpload(tree_id="small")
                refusal, _ = await actor.receive()
                assert isinstance(refusal, Refuse) and outbox.refuse(refusal)
                tasks.cancel_scope.cancel()
            assert outbox.dropped == {"oversized": 1} and tree_files(tmp_path) == ["small.tree"]


def test_a_tree_the_hub_would_hang_up_on_is_not_kept_to_be_sent_for_ever(tmp_path: Path) -> None:
    with Outbox.open(tmp_path, limit_trees=10, limit_bytes=2**16) as outbox:
        with pytest.raises(ValueError, match=r"more than hub\.max_message_bytes = 65536: raise that"):
            outbox.put(large_tree())
        outbox.put(small_tree("small"))
        assert len(outbox) == 1 and tree_files(tmp_path) == ["small.tree"]


def test_two_actors_cannot_share_an_outbox(tmp_path: Path) -> None:
    with (
        Outbox.open(tmp_path, limit_trees=2),
        pytest.raises(UserError, match="--actor-id"),
        Outbox.open(tmp_path, limit_trees=2),
    ):
        pass


async def test_a_tree_more_costs_the_same_however_many_wait_for_the_hub(tmp_path: Path) -> None:
    work: list[int] = []
    for backlog in (WINDOW_TREES, 4 * WINDOW_TREES):
        wire = Wire()
        with Outbox.open(tmp_path / str(backlog), limit_trees=1_000) as outbox:
            for number in range(backlog):
                outbox.put(small_tree(f"tree-{number}"))
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(outbox.upload, wire)
                await wire.wait_sent(WINDOW_TREES)
                await anyio.wait_all_tasks_blocked()
                with lines_run(module) as lines:
                    outbox.put(small_tree("one more"))
                    await anyio.wait_all_tasks_blocked()
                    outbox.acknowledge("tree-0")
                    await wire.wait_sent(WINDOW_TREES + 1)
                    await anyio.wait_all_tasks_blocked()
                work.append(lines[0])
                tasks.cancel_scope.cancel()
    assert work[0] == work[1]
