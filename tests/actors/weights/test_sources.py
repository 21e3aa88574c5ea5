"""Weights from the learner's folder or over relays; whatever these get wrong is left for the hub."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
from anyio.abc import TaskStatus

from actors.engines.sglang.launch import free_port
from actors.greet import greet
from actors.weights.relay import PULLER_CHUNKS, Post, Relay, parse, run_relay
from actors.weights.sources import FolderSource, RelaySource, beside_hub
from matpo.config import ActorWeights
from matpo.errors import UserError
from protocols.channel import ChannelError, HubClient, HubSocket, new_actor_keys, new_keys
from protocols.keys import ActorKeys, HubKeys, allow
from protocols.messages import PROTOCOL, Chunk, ChunkRequest, Drain, Heartbeat, PullHello, Refuse, Welcome
from protocols.refusals import HubInput
from tests.actors.weights.parts import HoldingEngine
from tests.actors.weights.rig import CHUNK_BYTES, Actor, Learner, learner, weights_at

RUN = "test"


def pull_hello(name: str, run: str | None = RUN) -> PullHello:
    return PullHello(protocol=PROTOCOL, puller_id=name, run=run)


@asynccontextmanager
async def relay_of(endpoint: str, name: str, *, memory_bytes: int = 2**30) -> AsyncIterator[tuple[str, Relay]]:
    """A relay in this process, and where it listens."""
    async with (
        HubSocket.bind("tcp://127.0.0.1:0") as down,
        HubClient.connect(endpoint, deadline_s=10) as up,
        anyio.create_task_group() as tasks,
    ):
        welcome = await greet(up, pull_hello(name, None), deadline_s=10)
        relay = Relay(up, down, hello=pull_hello(name), run=welcome.run, memory_bytes=memory_bytes, patience_s=0.3)
        tasks.start_soon(relay.run)
        yield down.endpoint, relay
        tasks.cancel_scope.cancel()


def behind(relay: str, name: str) -> RelaySource:
    return RelaySource(relay, run=RUN, puller_id=name, keys=None, patience_s=1.0, chunk_bytes=CHUNK_BYTES)


def actor_of(run: Learner, tmp_path: Path, name: str, relay: str, *, rest_s: float = 60.0) -> Actor:
    """An actor on a machine of its own."""
    others = [behind(relay, name)]
    return Actor(name, run.endpoint, HoldingEngine(), tmp_path / name, others=others, rest_s=rest_s)


async def test_what_leaves_the_hub_does_not_grow_with_the_actors_behind_chained_relays(tmp_path: Path) -> None:
    async with (
        learner(tmp_path / "run") as run,
        relay_of(run.endpoint, "relay-1") as (first, outer),
        relay_of(first, "relay-2") as (second, inner),
        anyio.create_task_group() as tasks,
    ):
        actors = [actor_of(run, tmp_path, f"actor-{n}", second) for n in range(4)]
        for actor in actors:
            tasks.start_soon(actor.run)
        published = 0
        for step in range(3):
            ready = await run.publish(weights_at(step), step=step)
            published += ready.objects[0].size_bytes
            for actor in actors:
                await actor.wait_version(step)
        assert run.served_bytes == outer.pulled_bytes == outer.served_bytes == inner.pulled_bytes == published
        assert inner.served_bytes == 4 * published
        assert [actor.chunks for actor in actors] == [0] * 4
        assert [actor.failures for actor in actors] == [{}] * 4
        tasks.cancel_scope.cancel()


async def test_a_relay_with_little_memory_pulls_again_what_it_had_to_forget(tmp_path: Path) -> None:
    async with (
        learner(tmp_path / "run") as run,
        relay_of(run.endpoint, "relay", memory_bytes=4 * CHUNK_BYTES) as (endpoint, relay),
        anyio.create_task_group() as tasks,
    ):
        ready = await run.publish(weights_at(0), step=0)
        for name in ("early", "late"):
            actor = actor_of(run, tmp_path, name, endpoint)
            tasks.start_soon(actor.run)
            await actor.wait_version(0)
        assert relay.pulled_bytes == relay.served_bytes == 2 * ready.objects[0].size_bytes
        tasks.cancel_scope.cancel()


async def test_a_relay_survives_a_restart_of_its_hub(tmp_path: Path) -> None:
    async with (
        learner(tmp_path / "run") as run,
        relay_of(run.endpoint, "relay") as (endpoint, _),
        anyio.create_task_group() as tasks,
    ):
        actor = actor_of(run, tmp_path, "actor", endpoint)
        tasks.start_soon(actor.run)
        await run.publish(weights_at(0), step=0)
        await actor.wait_version(0)
        await run.stop()
        await run.start()
        ready = await run.publish(weights_at(1), step=1)
        await actor.wait_version(1)
        assert run.served_bytes == ready.objects[0].size_bytes and actor.failures == {}
        tasks.cancel_scope.cancel()


async def bad_relay(kind: str, heard: list[HubInput], *, task_status: TaskStatus[str]) -> None:
    """Lets everybody in, and then: is silent, or sends zeros, or half of every chunk."""
    async with HubSocket.bind("tcp://127.0.0.1:0") as socket:
        task_status.started(socket.endpoint)
        while True:
            received = await socket.receive()
            heard.append(received.message)
            match received.message:
                case PullHello():
                    await socket.send(received.peer, Welcome(run=RUN, heartbeat_s=0.0))
                case ChunkRequest(name=name, offset=offset, size_bytes=size) if kind != "silent":
                    content = bytes(size if kind == "lying" else size // 2)
                    await socket.send(received.peer, Chunk(name=name, offset=offset), [content])
                case _:
                    pass


@pytest.mark.parametrize("kind", ["silent", "lying", "halving"])
async def test_a_relay_that_errs_is_left_for_the_hub_counted_and_tried_again_later(tmp_path: Path, kind: str) -> None:
    async with learner(tmp_path / "run") as run, anyio.create_task_group() as tasks:
        heard: list[HubInput] = []
        endpoint = str(await tasks.start(bad_relay, kind, heard))
        rested = actor_of(run, tmp_path, "rested", endpoint, rest_s=0.0)
        resting = actor_of(run, tmp_path, "resting", endpoint, rest_s=60.0)
        tasks.start_soon(rested.run)
        tasks.start_soon(resting.run)
        ready = await run.publish(weights_at(0), step=0)
        await rested.wait_version(0)
        await resting.wait_version(0)
        assert rested.failures == resting.failures == {"relay": 1}
        assert run.served_bytes == 2 * ready.objects[0].size_bytes
        await run.publish(weights_at(1), step=1)
        await rested.wait_version(1)
        await resting.wait_version(1)
        assert rested.failures == {"relay": 2} and resting.failures == {"relay": 1}
        tasks.cancel_scope.cancel()


async def test_a_relay_that_is_not_there_costs_one_attempt(tmp_path: Path) -> None:
    async with learner(tmp_path / "run") as run, anyio.create_task_group() as tasks:
        actor = actor_of(run, tmp_path, "actor", "tcp://127.0.0.1:9")
        tasks.start_soon(actor.run)
        await run.publish(weights_at(0), step=0)
        await actor.wait_version(0)
        assert actor.failures == {"relay": 1}
        tasks.cancel_scope.cancel()


async def test_hub_and_relay_refuse_those_who_want_another_run(tmp_path: Path) -> None:
    async with learner(tmp_path / "run") as run, relay_of(run.endpoint, "relay") as (endpoint, _):
        for place in (run.endpoint, endpoint):
            async with HubClient.connect(place, deadline_s=10) as client:
                with pytest.raises(
                    UserError, match="wants weights of run 'other', here are those of 'test'; correct the address"
                ):
                    await greet(client, pull_hello("stray", "other"), deadline_s=10)
                await client.send(ChunkRequest(name="keyframe-0", offset=0, size_bytes=1))
                answer, _ = await client.receive()
                assert isinstance(answer, Refuse) and answer.reason == "unknown_peer"
        async with HubClient.connect(endpoint, deadline_s=10) as client:
            await greet(client, pull_hello("puller"), deadline_s=10)
            await client.send(Heartbeat(leases=(), version=0, live_episodes=0, outbox_trees=0, sampled_tokens=0))
            answer, _ = await client.receive()
            assert answer == Refuse(reason="unexpected", detail="heartbeat belongs to the hub; this is a relay")


async def test_a_puller_that_asks_for_everything_at_once_does_not_keep_another_waiting_behind_it() -> None:
    asked: list[int] = []
    begin = anyio.Event()
    async with HubSocket.bind("tcp://127.0.0.1:0") as hub, anyio.create_task_group() as tasks:

        async def serve() -> None:
            while True:
                received = await hub.receive()
                match received.message:
                    case PullHello():
                        await hub.send(received.peer, Welcome(run=RUN, heartbeat_s=1.0))
                    case ChunkRequest(name=name, offset=offset):
                        await begin.wait()
                        asked.append(offset)
                        await hub.send(received.peer, Chunk(name=name, offset=offset), [b"x"])

        tasks.start_soon(serve)
        with anyio.fail_after(30):
            async with (
                relay_of(hub.endpoint, "relay") as (endpoint, _),
                HubClient.connect(endpoint) as greedy,
                HubClient.connect(endpoint) as modest,
            ):
                for client in (greedy, modest):
                    await greet(client, pull_hello("puller"), deadline_s=10)
                for offset in range(1000):
                    await greedy.send(ChunkRequest(name="k", offset=offset, size_bytes=1))
                for _ in range(1000 - PULLER_CHUNKS):
                    answer, _ = await greedy.receive()
                    assert isinstance(answer, Refuse) and (answer.reason, answer.about) == ("too_fast", "k")
                await modest.send(ChunkRequest(name="k", offset=5000, size_bytes=1))
                begin.set()
                assert (await modest.receive())[0] == Chunk(name="k", offset=5000)
                assert len(set(asked)) <= PULLER_CHUNKS + 1
                for _ in range(PULLER_CHUNKS):
                    assert isinstance((await greedy.receive())[0], Chunk)
                await greedy.send(ChunkRequest(name="k", offset=999, size_bytes=1))
                assert (await greedy.receive())[0] == Chunk(name="k", offset=999), "some have come: it may ask again"
        tasks.cancel_scope.cancel()


async def test_a_relay_forgets_links_that_are_gone_and_a_puller_it_forgot_says_hello_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.weights.relay.PEERS", 3)
    async with (
        learner(tmp_path / "run") as run,
        relay_of(run.endpoint, "relay") as (endpoint, relay),
        HubClient.connect(endpoint, deadline_s=10) as first,
    ):
        await greet(first, pull_hello("first"), deadline_s=10)
        for number in range(5):
            async with HubClient.connect(endpoint, deadline_s=10) as client:
                await greet(client, pull_hello(f"later-{number}"), deadline_s=10)
        assert len(relay._pullers) == 3
        await first.send(ChunkRequest(name="keyframe-0", offset=0, size_bytes=1))
        answer, _ = await first.receive()
        assert isinstance(answer, Refuse) and answer.reason == "unknown_peer"
        await greet(first, pull_hello("first"), deadline_s=10)


async def test_a_relay_is_no_actor_and_goes_home_with_the_run(tmp_path: Path) -> None:
    async with learner(tmp_path / "run") as run, anyio.create_task_group() as tasks:
        post = Post(run.endpoint, "tcp://127.0.0.1:0", None, "relay", 2**20)
        ended = anyio.Event()

        async def relaying() -> None:
            await run_relay(post)
            ended.set()

        tasks.start_soon(relaying)
        assert run.hub is not None
        while not run.hub.roster.pullers:
            await anyio.lowlevel.checkpoint()
        assert run.hub.roster.everyone() == []
        async with (
            relay_of(run.endpoint, "chained") as (endpoint, _),
            HubClient.connect(endpoint, deadline_s=10) as client,
        ):
            await greet(client, pull_hello("puller"), deadline_s=10)
            run.hub.drain("the run is complete")
            assert await client.receive() == (Drain(reason="the run is complete"), ())
        await ended.wait()


async def test_a_relay_needs_its_own_key_alone_and_lets_in_whom_it_knows(tmp_path: Path) -> None:
    new_keys(tmp_path / "keys")
    hub_keys, ours = HubKeys.load(tmp_path / "keys"), ActorKeys.load(tmp_path / "keys")
    relay_key = new_actor_keys(tmp_path / "relay", hub=hub_keys.pair.public)
    new_actor_keys(tmp_path / "strange", hub=relay_key)
    allow(tmp_path / "keys", relay_key)
    allow(tmp_path / "relay", ours.pair.public)
    assert sorted(path.name for path in (tmp_path / "relay").iterdir()) == ["actor.key", "allowed_actors"]
    async with learner(tmp_path / "run", keys=hub_keys) as run, anyio.create_task_group() as tasks:
        free = f"tcp://127.0.0.1:{free_port()}"
        tasks.start_soon(run_relay, Post(run.endpoint, free, tmp_path / "relay", "relay", 2**30))
        engines = [HoldingEngine(), HoldingEngine()]
        actors = []
        for engine, name, keys in zip(
            engines,
            ("known", "strange"),
            (ActorKeys(ours.pair, relay_key), ActorKeys.load(tmp_path / "strange")),
            strict=True,
        ):
            source = RelaySource(free, run=RUN, puller_id=name, keys=keys, patience_s=3.0, chunk_bytes=CHUNK_BYTES)
            actors.append(Actor(name, run.endpoint, engine, tmp_path / name, others=[source], keys=ours))
        for actor in actors:
            tasks.start_soon(actor.run)
        await run.publish(weights_at(0), step=0)
        for actor in actors:
            await actor.wait_version(0)
        assert [actor.failures for actor in actors] == [{}, {"relay": 1}]
        tasks.cancel_scope.cancel()


async def test_objects_are_read_where_the_learner_wrote_them_and_the_hub_has_what_is_missing_or_cut_short(
    tmp_path: Path,
) -> None:
    async with learner(tmp_path / "run") as run, anyio.create_task_group() as tasks:
        engine = HoldingEngine()
        folder = FolderSource(run.folder.weights)
        actor = Actor("actor", run.endpoint, engine, tmp_path / "a", others=[folder], rest_s=0.0)
        elsewhere = Actor(
            "other", run.endpoint, HoldingEngine(), tmp_path / "b", others=[FolderSource(tmp_path / "none")], rest_s=0.0
        )
        tasks.start_soon(actor.run)
        for step in range(2):
            await run.publish(weights_at(step), step=step)
            await actor.wait_version(step)
        assert run.served_bytes == 0 and actor.chunks == 0 and actor.failures == {}
        tasks.start_soon(elsewhere.run)
        await elsewhere.wait_version(1)
        assert elsewhere.failures == {"folder": 2} and elsewhere.chunks > 0
        tasks.cancel_scope.cancel()


async def test_a_file_that_is_cut_short_is_not_taken(tmp_path: Path) -> None:
    async with learner(tmp_path / "run") as run, anyio.create_task_group() as tasks:
        shared = tmp_path / "shared"
        shared.mkdir()
        ready = await run.publish(weights_at(0), step=0)
        name = ready.objects[0].name
        (shared / name).write_bytes((run.folder.weights / name).read_bytes()[:-10])
        actor = Actor("actor", run.endpoint, HoldingEngine(), tmp_path / "a", others=[FolderSource(shared)])
        tasks.start_soon(actor.run)
        await actor.wait_version(0)
        assert actor.failures == {"folder": 1}
        tasks.cancel_scope.cancel()


def test_sources_are_those_of_the_settings(tmp_path: Path) -> None:
    both = ActorWeights(folder=tmp_path, relay="tcp://127.0.0.1:1")
    assert [s.name for s in beside_hub(both, run=RUN, puller_id="a", keys=None)] == ["folder", "relay"]
    assert beside_hub(ActorWeights(), run=RUN, puller_id="a", keys=None) == []
    with pytest.raises(ChannelError, match="'nonsense' is not an address"):
        beside_hub(ActorWeights(relay="nonsense"), run=RUN, puller_id="a", keys=None)


def test_the_command_line_of_a_relay() -> None:
    post = parse(["--hub", "tcp://a:1", "--listen", "tcp://b:2", "--memory-mb", "3", "--relay-id", "r"])
    assert post == Post("tcp://a:1", "tcp://b:2", None, "r", 3 * 2**20)
    with pytest.raises(UserError, match="--memory-mb 0 must be at least 1"):
        parse(["--hub", "tcp://a:1", "--listen", "tcp://b:2", "--memory-mb", "0"])
