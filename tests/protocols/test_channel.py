"""The sockets: what is accepted arrives, what is not is answered and counted, and nobody hangs for ever."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
import zmq
import zmq.asyncio

from protocols.channel import (
    CannotListen,
    ChannelError,
    HubClient,
    HubSilent,
    HubSocket,
    HubUnreachable,
    KeysNeeded,
    TrainerLink,
    WrongKey,
    new_keys,
)
from protocols.keys import ActorKeys, HubKeys, allow
from protocols.messages import (
    Ack,
    BatchRequest,
    Drain,
    Goodbye,
    Heartbeat,
    LeaseRequest,
    NotYet,
    Ok,
    Refuse,
    StepDone,
    TreeUpload,
    Welcome,
)
from tests.chaos.link import Link

LOOPBACK = "tcp://127.0.0.1:0"


@pytest.fixture
async def hub() -> AsyncIterator[HubSocket]:
    async with HubSocket.bind(LOOPBACK, max_message_bytes=10_000) as opened:
        yield opened


@pytest.fixture
async def raw(hub: HubSocket) -> AsyncIterator[zmq.asyncio.Socket]:
    """A peer that may send anything."""
    context = zmq.asyncio.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    dealer.connect(hub.endpoint)
    yield dealer
    dealer.close()
    context.term()


async def test_a_tree_and_its_ack_cross_the_wire_with_their_frames(hub: HubSocket) -> None:
    async with HubClient.connect(hub.endpoint) as actor:
        with anyio.fail_after(5):
            assert await actor.send(TreeUpload(tree_id="t1"), [b"header", memoryview(b"arrays")])
            received = await hub.receive()
            assert received.message == TreeUpload(tree_id="t1")
            assert [bytes(frame) for frame in received.frames] == [b"header", b"arrays"]
            assert await hub.send(received.peer, Ack(tree_id="t1"), [b"x"])
            message, frames = await actor.receive()
            assert (message, [bytes(frame) for frame in frames]) == (Ack(tree_id="t1"), [b"x"])


async def test_messages_of_one_actor_arrive_in_order_and_all(hub: HubSocket) -> None:
    async with HubClient.connect(hub.endpoint) as actor, anyio.create_task_group() as tasks:

        async def send_all() -> None:
            for number in range(500):
                await actor.send(LeaseRequest(episodes=number))

        tasks.start_soon(send_all)
        with anyio.fail_after(10):
            for number in range(500):
                assert (await hub.receive()).message == LeaseRequest(episodes=number)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([b"garbage"], "malformed"),
        ([b""], "malformed"),
        ([b"[]"], "malformed"),
        ([b'{"kind": "goodbye"}'], "malformed"),
        ([b'{"kind": "goodbye", "reason": "x", "extra": 1}'], "malformed"),
        ([b'{"kind": "nonsense"}'], "unexpected"),
        ([Ack(tree_id="t").model_dump_json().encode()], "unexpected"),
        ([b"{}", bytes(10_000)], "oversized"),
        ([b"{}", *[b""] * 64], "oversized"),
        ([b"[" * 9_000], "malformed"),
    ],
)
async def test_what_is_no_message_is_answered_by_a_refusal_and_counted(
    hub: HubSocket, raw: zmq.asyncio.Socket, parts: list[bytes], reason: str
) -> None:
    with anyio.fail_after(5):
        await raw.send_multipart(parts)
        await raw.send_multipart([LeaseRequest(episodes=1).model_dump_json().encode()])
        received = await hub.receive()
        assert received.message == LeaseRequest(episodes=1), "the hub goes on"
        answer = Refuse.model_validate_json((await raw.recv_multipart())[0])
    assert answer.reason == reason
    assert hub.refused == {reason: 1}


async def test_a_message_far_beyond_the_limit_only_costs_its_sender_the_connection(
    hub: HubSocket, raw: zmq.asyncio.Socket
) -> None:
    async with HubClient.connect(hub.endpoint) as actor:
        with anyio.fail_after(5):
            await raw.send_multipart([b"{}", bytes(1_000_000)])
            await actor.send(Goodbye(reason="done"))
            assert (await hub.receive()).message == Goodbye(reason="done")


async def test_sending_to_a_peer_that_is_not_there_says_so(hub: HubSocket) -> None:
    assert not await hub.send(b"nobody", Drain(reason="done"))


async def test_a_cancelled_receive_loses_no_message(hub: HubSocket) -> None:
    async with HubClient.connect(hub.endpoint) as actor:
        with anyio.move_on_after(0.01):
            await actor.receive()
        with anyio.fail_after(5):
            await actor.send(LeaseRequest(episodes=1))
            peer = (await hub.receive()).peer
            for number in range(20):
                await hub.send(peer, Ack(tree_id=str(number)))
            for number in range(20):
                with anyio.CancelScope() as scope:
                    scope.cancel()
                    await actor.receive()
                assert scope.cancelled_caught
                assert (await actor.receive())[0] == Ack(tree_id=str(number))


async def test_the_last_words_before_closing_arrive(hub: HubSocket) -> None:
    async with HubClient.connect(hub.endpoint) as actor:
        await actor.send(Goodbye(reason="done"))
    with anyio.fail_after(5):
        assert (await hub.receive()).message == Goodbye(reason="done")


async def test_a_client_finds_the_hub_that_comes_back_and_sends_nothing_while_it_is_away() -> None:
    async with HubSocket.bind(LOOPBACK) as first:
        endpoint = first.endpoint
        opened = HubClient.connect(endpoint)
        actor = await opened.__aenter__()
    try:
        with anyio.fail_after(10):
            # The broken connection is noticed when the system says so; until then what is sent may be lost.
            while await actor.send(LeaseRequest(episodes=1)):
                await anyio.lowlevel.checkpoint()
            async with HubSocket.bind(endpoint) as second:
                await actor.wait_connected()
                assert await actor.send(LeaseRequest(episodes=2))
                received = await second.receive()
                assert received.message == LeaseRequest(episodes=2), "nothing stale before it"
                await second.send(received.peer, Welcome(run="r", heartbeat_s=1))
                assert (await actor.receive())[0] == Welcome(run="r", heartbeat_s=1)
    finally:
        await opened.__aexit__(None, None, None)


async def test_an_actor_that_comes_back_is_answered_on_its_new_connection(hub: HubSocket) -> None:
    with anyio.fail_after(5):
        async with HubClient.connect(hub.endpoint) as old:
            await old.send(LeaseRequest(episodes=1))
            await hub.receive()
            async with HubClient.connect(hub.endpoint) as new:
                await new.send(LeaseRequest(episodes=2))
                peer = (await hub.receive()).peer
                await hub.send(peer, Ack(tree_id="t"))
                assert (await new.receive())[0] == Ack(tree_id="t")


async def test_a_hub_that_talks_nonsense_is_skipped_and_counted_by_the_client() -> None:
    context = zmq.asyncio.Context()
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    with anyio.fail_after(5):
        async with HubClient.connect(f"tcp://127.0.0.1:{port}") as actor:
            await actor.send(LeaseRequest(episodes=1))
            peer, _ = await router.recv_multipart()
            for header in (b"junk", LeaseRequest(episodes=1).model_dump_json().encode(), b'{"kind":"ok"}'):
                await router.send_multipart([peer, header])
            assert (await actor.receive())[0] == Ok()
            assert actor.refused == {"malformed": 1, "unexpected": 1}
    router.close(linger=0)
    context.term()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def test_an_unreachable_hub_is_a_named_error_within_the_deadline() -> None:
    with anyio.fail_after(5), pytest.raises(HubUnreachable, match=r"no hub answered at tcp://.* within 0.2 s"):
        async with HubClient.connect(f"tcp://127.0.0.1:{free_port()}", deadline_s=0.2):
            pass


async def test_a_taken_address_is_a_named_error(hub: HubSocket) -> None:
    with pytest.raises(CannotListen, match=r"Address already in use; set hub\.listen"):
        async with HubSocket.bind(hub.endpoint):
            pass


@pytest.mark.parametrize(
    "endpoint", ["nonsense", "tcp://127.0.0.1", "tcp://127.0.0.1:99999", "http://127.0.0.1:80", ""]
)
async def test_what_is_no_address_is_a_named_error(endpoint: str) -> None:
    with pytest.raises(ChannelError, match="is not an address; expected tcp://HOST:PORT"):
        async with HubSocket.bind(endpoint):
            pass
    with pytest.raises(ChannelError, match="is not an address; expected tcp://HOST:PORT"):
        async with HubClient.connect(endpoint):
            pass


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "192.168.1.7", "hub.example.org", "[2001:db8::1]"])
async def test_without_keys_nothing_beyond_this_machine_is_used_and_the_remedy_is_named(
    host: str,
) -> None:
    with pytest.raises(KeysNeeded, match="matpo keys new"):
        async with HubSocket.bind(f"tcp://{host}:5555"):
            pass
    with pytest.raises(KeysNeeded, match="matpo keys new"):
        async with HubClient.connect(f"tcp://{host}:5555"):
            pass


async def test_an_ipc_address_needs_no_keys(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/hub.ipc"
    async with HubSocket.bind(endpoint) as hub, HubClient.connect(endpoint) as actor:
        with anyio.fail_after(5):
            await actor.send(LeaseRequest(episodes=1))
            assert (await hub.receive()).message == LeaseRequest(episodes=1)


async def test_only_an_actor_with_an_allowed_key_and_the_right_hub_key_comes_in(tmp_path: Path) -> None:
    new_keys(tmp_path / "ours")
    new_keys(tmp_path / "theirs")
    ours, theirs = ActorKeys.load(tmp_path / "ours"), ActorKeys.load(tmp_path / "theirs")
    stranger = ActorKeys(theirs.pair, ours.hub)
    with anyio.fail_after(20):
        async with HubSocket.bind(LOOPBACK, keys=HubKeys.load(tmp_path / "ours")) as hub:
            async with HubClient.connect(hub.endpoint, keys=ours) as actor:
                await actor.send(Goodbye(reason="done"))
                assert (await hub.receive()).key == ours.pair.public
            refused: list[ActorKeys | None] = [stranger, ActorKeys(ours.pair, theirs.hub), None]
            for keys in refused:
                with pytest.raises(WrongKey):
                    async with HubClient.connect(hub.endpoint, keys=keys):
                        pass
            allow(tmp_path / "ours", theirs.pair.public)
            async with HubClient.connect(hub.endpoint, keys=stranger) as actor:
                await actor.send(Goodbye(reason="done"))
                assert (await hub.receive()).key == theirs.pair.public


async def test_a_link_that_is_cut_in_every_handshake_is_not_taken_for_a_wrong_key(tmp_path: Path) -> None:
    new_keys(tmp_path)
    cut = 8  # connections; each failed handshake is one, and another looks whether a hub is there
    async with HubSocket.bind(LOOPBACK, keys=HubKeys.load(tmp_path)) as hub:
        port = int(hub.endpoint.rpartition(":")[2])

        def place() -> tuple[str, int] | None:
            nonlocal cut
            cut -= 1
            return None if cut >= 0 else ("127.0.0.1", port)

        async with Link.listening(place) as link:
            with anyio.fail_after(20):
                async with HubClient.connect(link.endpoint, keys=ActorKeys.load(tmp_path)) as actor:
                    assert actor.connected and cut < 0


async def test_keys_that_the_hub_does_not_use_are_a_named_error(hub: HubSocket, tmp_path: Path) -> None:
    new_keys(tmp_path / "keys")
    with anyio.fail_after(10), pytest.raises(WrongKey):
        async with HubClient.connect(hub.endpoint, keys=ActorKeys.load(tmp_path / "keys")):
            pass


async def asked_from_a_thread(question: Callable[[], object]) -> object:
    return await anyio.to_thread.run_sync(question, abandon_on_cancel=True)


async def test_the_trainer_asks_again_and_takes_no_late_answer_for_a_new_one(
    hub: HubSocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocols.channel._FIRST_PATIENCE_S", 0.05)
    answers: list[object] = []

    def train() -> None:
        with TrainerLink(hub.endpoint) as link:
            answers.append(link.request(BatchRequest(step=1), deadline_s=5, waiting_for="the batch of step 1")[0])
            done = StepDone(lineage=0, step=1, trained=(), filtered=())
            answers.append(link.request(done, deadline_s=5, waiting_for="the journal")[0])

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(asked_from_a_thread, train)
            first, second = await hub.receive(), await hub.receive()
            assert first.message == second.message == BatchRequest(step=1)
            await hub.send(second.peer, NotYet())
            await hub.send(first.peer, NotYet())
            while not isinstance((received := await hub.receive()).message, StepDone):
                pass
            await hub.send(received.peer, Ok())
    assert answers == [NotYet(), Ok()]


async def test_a_silent_hub_is_a_named_error_for_the_trainer(hub: HubSocket) -> None:
    def train() -> None:
        with TrainerLink(hub.endpoint) as link:
            link.request(BatchRequest(step=1), deadline_s=0.1, waiting_for="the batch of step 1")

    with (
        anyio.fail_after(5),
        pytest.raises(HubSilent, match=r"batch_request for 0.1 s \(waiting for the batch"),
    ):
        await asked_from_a_thread(train)


async def test_a_late_actor_and_a_slow_one_get_every_message(hub: HubSocket) -> None:
    """ROUTER drops at a send mark; ours is far beyond what a slow reader leaves lying."""
    beat = Heartbeat(leases=(), version=-1, live_episodes=0, outbox_trees=0, sampled_tokens=0)
    with anyio.fail_after(20):
        async with HubClient.connect(hub.endpoint) as slow:
            await slow.send(beat)
            peer = (await hub.receive()).peer
            for number in range(3000):
                assert await hub.send(peer, Ack(tree_id=str(number)), [bytes(1000)])
            async with HubClient.connect(hub.endpoint) as late:
                await late.send(beat)
                assert await hub.send((await hub.receive()).peer, Ack(tree_id="first"))
                assert (await late.receive())[0] == Ack(tree_id="first")
            for number in range(3000):
                assert (await slow.receive())[0] == Ack(tree_id=str(number))
