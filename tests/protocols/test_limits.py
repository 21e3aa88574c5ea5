"""What one peer may send and leave lying: the rest is refused, counted, and nobody else's business."""

from __future__ import annotations

import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

import anyio
import pytest
import zmq
import zmq.asyncio

from protocols.channel import HubClient, HubSocket, Limits
from protocols.limits import MAX_BACKLOG_BYTES, PEERS, Backlogs, Meter
from protocols.messages import MAX_CHUNK_BYTES, Ack, Chunk, ChunkRequest, LeaseRequest, Refuse

LOOPBACK = "tcp://127.0.0.1:0"
Dealer = Callable[[HubSocket], AbstractAsyncContextManager[zmq.asyncio.Socket]]


def meter(*, messages_per_s: float = 10, bytes_per_s: float = 1000, burst_bytes: int = 3000) -> Meter:
    return Meter(Limits(messages_per_s, bytes_per_s), burst_bytes=burst_bytes)


def passed(at: Meter, peer: bytes, times: int, *, size_bytes: int = 1, now_s: float = 0.0) -> int:
    return sum(at.refusal(peer, size_bytes, now_s) is None for _ in range(times))


def test_a_quiet_peer_may_send_two_seconds_worth_at_once_and_then_at_its_rate() -> None:
    at = meter()
    assert passed(at, b"a", 50) == 20  # 2 s of 10 messages
    assert passed(at, b"a", 50, now_s=0.5) == 5
    assert passed(at, b"a", 50, now_s=100.0) == 20, "what was not used for long does not add up"


def test_bytes_are_limited_too_and_the_largest_message_always_passes_a_quiet_peer() -> None:
    at = meter()  # at most 3000 bytes at once, 1000 a second
    assert passed(at, b"a", 3, size_bytes=3000) == 1
    assert passed(at, b"a", 3, size_bytes=500, now_s=1.0) == 2
    assert passed(at, b"b", 1, size_bytes=5000) == 1, "too large for any limit: refused for its size, not for its rate"


def test_one_peer_that_is_too_fast_takes_nothing_from_another() -> None:
    at = meter()
    passed(at, b"a", 1000)
    assert passed(at, b"b", 20) == 20


def test_the_limit_names_itself_and_the_setting() -> None:
    at = meter()
    passed(at, b"a", 20)
    refusal = at.refusal(b"a", 1, 0.0)
    assert refusal == Refuse(
        reason="too_fast",
        detail="more than 10 messages and 1000 bytes a second, after a burst of 2 s; send less, or raise"
        " hub.max_messages_per_s or hub.max_bytes_per_s",
    )


def test_a_peer_that_is_too_fast_is_told_once_a_second() -> None:
    at = meter()
    told = 0
    for tenth in range(30):
        for _ in range(50):
            if at.refusal(b"a", 1, tenth / 10) is not None:
                told += at.tells(b"a")
    assert told == 3


def test_no_number_of_peers_fills_the_memory() -> None:
    at = meter()
    for number in range(3 * PEERS):
        at.refusal(number.to_bytes(4, "big"), 1, 0.0)
    assert passed(at, (3 * PEERS - 1).to_bytes(4, "big"), 50) == 19, "the last are remembered"
    assert passed(at, bytes(4), 50) == 20, "the first are forgotten"


@dataclass
class Parcel:
    """Bytes on their way."""

    done: bool = False


def test_a_peer_that_reads_nothing_gets_no_more_chunks_until_it_reads() -> None:
    backlogs = Backlogs()
    parcels = [Parcel() for _ in range(MAX_BACKLOG_BYTES // MAX_CHUNK_BYTES)]
    request = ChunkRequest(name="keyframe-0", offset=0, size_bytes=MAX_CHUNK_BYTES)
    for parcel in parcels:
        assert backlogs.refusal(b"slow", request) is None
        backlogs.add(b"slow", parcel, MAX_CHUNK_BYTES)
    refusal = backlogs.refusal(b"slow", request)
    assert refusal is not None
    assert (refusal.reason, refusal.about) == ("too_fast", "keyframe-0")
    assert backlogs.refusal(b"other", request) is None
    parcels[0].done = True
    assert backlogs.refusal(b"slow", request) is None


def test_what_has_arrived_is_forgotten_though_its_peer_never_asks_for_chunks() -> None:
    backlogs, parcels = Backlogs(), [Parcel() for _ in range(100)]
    forgotten = [weakref.ref(parcel) for parcel in parcels]
    while parcels:
        backlogs.add(b"trainer", parcels[-1], 10)
        parcels.pop().done = True
    assert sum(parcel() is not None for parcel in forgotten) == 1, "only the last was not looked at again"


@asynccontextmanager
async def dealer(hub: HubSocket, name: bytes | None = None) -> AsyncIterator[zmq.asyncio.Socket]:
    """A peer that may send anything."""
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    if name is not None:
        socket.routing_id = name
    socket.connect(hub.endpoint)
    try:
        yield socket
    finally:
        socket.close()
        context.term()


async def test_a_flood_is_refused_and_counted_while_another_actor_is_served() -> None:
    header = LeaseRequest(episodes=7).model_dump_json().encode()
    heard: list[int] = []
    async with (
        HubSocket.bind(LOOPBACK, limits=Limits(messages_per_s=10, bytes_per_s=10_000)) as hub,
        HubClient.connect(hub.endpoint) as actor,
        dealer(hub) as flooder,
        anyio.create_task_group() as tasks,
    ):

        async def serve() -> None:
            while True:
                received = await hub.receive()
                assert isinstance(received.message, LeaseRequest)
                heard.append(received.message.episodes)
                await hub.send(received.peer, Ack(tree_id=str(received.message.episodes)))

        async def flood() -> None:
            while True:
                await flooder.send_multipart([header])

        with anyio.fail_after(30):
            tasks.start_soon(serve)
            tasks.start_soon(flood)
            while hub.refused["too_fast"] < 1000:
                await anyio.lowlevel.checkpoint()
            for number in range(100, 105):
                await actor.send(LeaseRequest(episodes=number))
                assert (await actor.receive())[0] == Ack(tree_id=str(number))
        tasks.cancel_scope.cancel()
    assert hub.refused.keys() == {"too_fast"}


async def test_what_a_peer_does_not_read_is_known_until_the_network_has_taken_it() -> None:
    large = bytes(MAX_CHUNK_BYTES)
    request = ChunkRequest(name="k", offset=0, size_bytes=MAX_CHUNK_BYTES)
    async with HubSocket.bind(LOOPBACK) as hub, dealer(hub) as deaf:
        deaf.rcvhwm = 1
        with anyio.fail_after(30):
            refused = 0
            while not refused:
                await deaf.send_multipart([request.model_dump_json().encode()])
                with anyio.move_on_after(0.2):
                    received = await hub.receive()
                    await hub.send(received.peer, Chunk(name="k", offset=0), [large])
                refused = hub.refused["too_fast"]
            while refused:  # it reads after all, and is served again
                parts = await deaf.recv_multipart()
                if len(parts) == 1:
                    break
            await deaf.send_multipart([request.model_dump_json().encode()])
            assert (await hub.receive()).message == request


async def test_nobody_takes_over_the_connection_of_another_by_its_name() -> None:
    header = LeaseRequest(episodes=1).model_dump_json().encode()
    async with HubSocket.bind(LOOPBACK) as hub, dealer(hub, b"twin") as first:
        with anyio.fail_after(5):
            await first.send_multipart([header])
            peer = (await hub.receive()).peer
        async with dealer(hub, b"twin") as second:
            with anyio.move_on_after(0.3) as silence:
                await second.send_multipart([header])
                await hub.receive()
            assert silence.cancelled_caught, "the second is not heard"
            with anyio.fail_after(5):
                await hub.send(peer, Ack(tree_id="t"))
                assert (await first.recv_multipart()) == [Ack(tree_id="t").model_dump_json().encode()]


@pytest.mark.parametrize("count", [1, 20_000])
async def test_answers_to_one_who_reads_nothing_end_at_a_mark_and_not_in_memory(count: int) -> None:
    async with HubSocket.bind(LOOPBACK) as hub, dealer(hub) as deaf:
        deaf.rcvhwm = 1
        with anyio.fail_after(20):
            await deaf.send_multipart([LeaseRequest(episodes=1).model_dump_json().encode()])
            peer = (await hub.receive()).peer
            sent = [await hub.send(peer, Ack(tree_id="t"), [bytes(2000)]) for _ in range(count)]
        assert all(sent) == (count == 1)
