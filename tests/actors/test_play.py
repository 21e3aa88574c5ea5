"""Leases become episodes: concurrency, versions, cancellation, expiry, failure."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio

from actors import play
from actors.play import Player
from matpo.waits import waiting
from protocols.messages import Lease
from protocols.records import EpisodeTree, Task
from tests.actors.trees import small_tree
from tests.counting import lines_run


def lease_of(name: str, episodes: int, *, min_version: int = 0, expires_s: float = 60.0) -> Lease:
    return Lease(
        lease_id=name,
        group_id=f"group-{name}",
        task=Task.make("who ?", ("me",)),
        episodes=tuple(range(episodes)),
        purpose="train",
        min_version=min_version,
        expires_s=expires_s,
    )


@dataclass
class Shelf:
    """A store in memory."""

    full: bool = False
    trees: list[EpisodeTree] = field(default_factory=list)

    def put(self, tree: EpisodeTree) -> None:
        self.trees.append(tree)


class Theatre:
    """Episodes that end when the test says so."""

    def __init__(self) -> None:
        self.version = 0
        self.begun: list[str] = []
        self.gates: dict[str, anyio.Event] = {}

    async def play(self, lease: Lease, episode: int) -> EpisodeTree:
        name = f"{lease.lease_id}/{episode}"
        self.begun.append(name)
        self.gates[name] = anyio.Event()
        await self.gates[name].wait()
        if lease.lease_id == "broken":
            raise LookupError("no such document")
        if lease.lease_id == "broken agents":
            raise ExceptionGroup("agents", [ValueError("no such tool")])
        return small_tree(name, lease_id=lease.lease_id, episode=episode)


@asynccontextmanager
async def playing(theatre: Theatre, shelf: Shelf, *, concurrency: int) -> AsyncIterator[Player]:
    player = Player(theatre.play, version=lambda: theatre.version, store=shelf, concurrency=concurrency)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(player.run)
            yield player
            tasks.cancel_scope.cancel()


async def test_no_more_episodes_are_live_than_allowed_and_the_rest_follow() -> None:
    theatre, shelf = Theatre(), Shelf()
    async with playing(theatre, shelf, concurrency=3) as player:
        assert player.wanted == 3
        player.take(lease_of("a", 2))
        player.take(lease_of("b", 2))
        await anyio.wait_all_tasks_blocked()
        assert theatre.begun == ["a/0", "a/1", "b/0"]
        assert (player.live, player.queued, player.wanted) == (3, 1, 0)
        theatre.gates["a/1"].set()
        await anyio.wait_all_tasks_blocked()
        assert theatre.begun[-1] == "b/1" and [t.tree_id for t in shelf.trees] == ["a/1"]
        for name in ("a/0", "b/0", "b/1"):
            theatre.gates[name].set()
        await anyio.wait_all_tasks_blocked()
        assert player.leases == frozenset() and player.wanted == 3 and player.counts["finished"] == 4


async def test_a_lease_that_is_sent_twice_is_played_once() -> None:
    theatre, shelf = Theatre(), Shelf()
    async with playing(theatre, shelf, concurrency=8) as player:
        player.take(lease_of("a", 1))
        await anyio.wait_all_tasks_blocked()
        player.take(lease_of("a", 1))
        theatre.gates["a/0"].set()
        await anyio.wait_all_tasks_blocked()
        player.take(lease_of("a", 1))
        await anyio.wait_all_tasks_blocked()
        assert theatre.begun == ["a/0"]


async def test_episodes_wait_for_weights_that_are_new_enough_while_others_start() -> None:
    theatre, shelf = Theatre(), Shelf()
    theatre.version = -1
    async with playing(theatre, shelf, concurrency=8) as player:
        player.take(lease_of("late", 1, min_version=2))
        player.take(lease_of("any", 1))
        await anyio.wait_all_tasks_blocked()
        assert theatre.begun == [] and player.waiting_for is not None
        theatre.version = 0
        player.notice()
        await anyio.wait_all_tasks_blocked()
        assert theatre.begun == ["any/0"]
        assert player.waiting_for == waiting("weights", version=2)
        theatre.version = 2
        player.notice()
        await anyio.wait_all_tasks_blocked()
        assert theatre.begun == ["any/0", "late/0"]


async def test_a_cancelled_lease_ends_its_episodes_and_leaves_no_tree() -> None:
    theatre, shelf = Theatre(), Shelf()
    async with playing(theatre, shelf, concurrency=1) as player:
        player.take(lease_of("a", 2))
        player.take(lease_of("b", 1))
        await anyio.wait_all_tasks_blocked()
        player.cancel("a")
        await anyio.wait_all_tasks_blocked()
        assert theatre.begun == ["a/0", "b/0"] and shelf.trees == []
        assert player.leases == {"b"} and player.counts["cancelled"] == 2


async def test_what_was_not_begun_of_an_expired_lease_is_given_up_and_what_is_under_way_is_finished() -> None:
    theatre, shelf = Theatre(), Shelf()
    async with playing(theatre, shelf, concurrency=1) as player:
        player.take(lease_of("a", 3, expires_s=0.0))
        await anyio.wait_all_tasks_blocked()
        assert theatre.begun == []  # expired before it began
        player.take(lease_of("b", 2))
        await anyio.wait_all_tasks_blocked()
        assert theatre.begun == ["b/0"] and player.counts["expired"] == 3
        theatre.gates["b/0"].set()
        await anyio.wait_all_tasks_blocked()
        assert [tree.tree_id for tree in shelf.trees] == ["b/0"]


async def test_a_failed_episode_ends_neither_the_actor_nor_its_siblings() -> None:
    theatre, shelf = Theatre(), Shelf()
    async with playing(theatre, shelf, concurrency=3) as player:
        for name in ("broken", "broken agents", "a"):
            player.take(lease_of(name, 1))
        await anyio.wait_all_tasks_blocked()
        theatre.gates["broken/0"].set()
        theatre.gates["broken agents/0"].set()
        await anyio.wait_all_tasks_blocked()
        theatre.gates["a/0"].set()
        await anyio.wait_all_tasks_blocked()
        assert player.counts == {"failed": 2, "finished": 1} and player.leases == frozenset()


async def test_playing_pauses_while_the_outbox_is_full() -> None:
    theatre, shelf = Theatre(), Shelf(full=True)
    async with playing(theatre, shelf, concurrency=2) as player:
        assert player.wanted == 0
        player.take(lease_of("a", 1))
        await anyio.wait_all_tasks_blocked()
        assert theatre.begun == []
        shelf.full = False
        player.notice()
        await anyio.wait_all_tasks_blocked()
        assert theatre.begun == ["a/0"]


async def test_draining_finishes_what_is_live_and_begins_nothing() -> None:
    theatre, shelf = Theatre(), Shelf()
    async with playing(theatre, shelf, concurrency=1) as player:
        player.take(lease_of("a", 2))
        await anyio.wait_all_tasks_blocked()
        async with anyio.create_task_group() as leaving:
            leaving.start_soon(player.drain)
            await anyio.wait_all_tasks_blocked()
            theatre.gates["a/0"].set()
        assert theatre.begun == ["a/0"] and len(shelf.trees) == 1 and player.wanted == 0


async def work_of(leases: int) -> int:
    """Lines run to begin the last of that many leases, finish it, and hear from the hub."""
    theatre, shelf = Theatre(), Shelf()
    async with playing(theatre, shelf, concurrency=leases) as player:
        for number in range(leases - 1):
            player.take(lease_of(f"lease {number}", 1))
        for _ in range(2):
            await anyio.wait_all_tasks_blocked()
        with lines_run(play) as lines:
            player.take(lease_of("last", 1))
            await anyio.wait_all_tasks_blocked()
            theatre.gates["last/0"].set()
            await anyio.wait_all_tasks_blocked()
            player.renew()
            assert player.wanted == 1 and player.live == leases - 1
    return lines[0]


async def test_an_episode_among_hundreds_costs_no_more_than_one_among_ten() -> None:
    assert await work_of(400) == await work_of(10)


async def test_waiting_leases_are_not_gone_through_for_every_episode_that_begins() -> None:
    theatre, shelf = Theatre(), Shelf()
    player = Player(theatre.play, version=lambda: 0, store=shelf, concurrency=1_000)
    for number in range(200):
        player.take(lease_of(f"lease {number}", 2))
    with lines_run(play) as lines, anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(player.run)
            await anyio.wait_all_tasks_blocked()
            assert player.live == len(theatre.begun) == 400 and player.queued == 0
            tasks.cancel_scope.cancel()
    assert lines[0] < 400 * 60
