"""The sockets between actors, hub and trainer: the hub answers what it cannot accept and is never ended by it; a peer
that is gone, a wrong key or a silent hub is a named error, not a hang."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import anyio
import zmq

from protocols.keys import ActorKeys, HubKeys, write_actor_keys, write_hub_keys
from protocols.limits import MAX_MESSAGE_BYTES, Backlogs, Limits, Meter
from protocols.messages import ActorMessage, ChunkRequest, HubMessage, Refuse, TrainerMessage
from protocols.refusals import (
    CannotListen,
    ChannelError,
    Frame,
    HubInput,
    HubSilent,
    HubUnreachable,
    KeysNeeded,
    Received,
    WrongKey,
    check_endpoint,
    is_local,
    read_for_hub,
    read_from_hub,
)
from protocols.sockets import (
    TRACKED_BYTES,
    AsyncSocket,
    Doorkeeper,
    HandshakeWatcher,
    close,
    greets,
    new_pair,
    proven_key,
    receive,
    set_common_options,
)

__all__ = [
    "CannotListen", "ChannelError", "Frame", "HubClient", "HubInput", "HubSilent", "HubSocket", "HubUnreachable",
    "KeysNeeded", "Limits", "Received", "TrainerLink", "WrongKey", "is_local", "new_actor_keys", "new_keys",
]  # fmt: skip

_FIRST_PATIENCE_S: Final = 2.0
_LAST_PATIENCE_S: Final = 30.0
_MOST_QUEUED: Final = 10_000
"""Answers that wait for a peer who does not read. Never reached by one who does: what is large is asked for, in
credits. Beyond it `send` says that there is nobody (ROUTER drops silently only without MANDATORY)."""
_LARGEST_ANSWER_BYTES: Final = 2**30


def new_keys(directory: Path) -> None:
    """Make a hub pair and a first, allowed actor pair in `directory`. Raises `BadKeys` where keys exist already."""
    write_hub_keys(directory, hub=new_pair(), actor=new_pair())


def new_actor_keys(directory: Path, *, hub: str) -> str:
    """Make an actor's (or a relay's) own pair in `directory`, for the hub with this public key; returns its public key.

    Raises `BadKeys` where there is one already.
    """
    pair = new_pair()
    write_actor_keys(directory, pair, hub=hub)
    return pair.public


class HubSocket:
    """The hub's end. One `receive` loop, any number of senders. A peer is a connection, under a name made up here: the
    hub alone says who is who, so that nobody is answered in another's place.
    """

    def __init__(
        self, socket: zmq.Socket[bytes], *, max_message_bytes: int, limits: Limits | None, keyed: bool
    ) -> None:
        self._socket = AsyncSocket(socket)
        self._max_message_bytes = max_message_bytes
        self._meter = None if limits is None else Meter(limits, burst_bytes=max_message_bytes)
        self._backlogs = Backlogs()
        self._keyed = keyed
        self.endpoint: str = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        """Where peers connect, a free port filled in."""
        self.refused: Counter[str] = Counter()
        """Messages refused here, by reason."""

    @classmethod
    @asynccontextmanager
    async def bind(
        cls,
        endpoint: str,
        *,
        keys: HubKeys | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        limits: Limits | None = None,
    ) -> AsyncIterator[Self]:
        """Listen; `limits` bound what each peer may send. Raises `KeysNeeded` beyond this machine without keys,
        `CannotListen` where the address is taken.
        """
        check_endpoint(endpoint, keys)
        context = zmq.Context()
        doorkeeper = None if keys is None else Doorkeeper(context, keys)
        socket = context.socket(zmq.ROUTER)
        try:
            set_common_options(socket, endpoint)
            # At its receive mark ROUTER only makes the peer wait.
            socket.sndhwm, socket.rcvhwm = _MOST_QUEUED, 64
            socket.router_mandatory = True
            # Up to this limit a message is refused with an answer; beyond it ZeroMQ drops the connection.
            socket.maxmsgsize = 2 * max_message_bytes
            if keys is not None:
                socket.curve_server = True
                socket.curve_secretkey = keys.pair.secret.encode()
                socket.curve_publickey = keys.pair.public.encode()
                socket.zap_domain = b"matpo"
            try:
                socket.bind(endpoint)
            except zmq.ZMQError as error:
                raise CannotListen(endpoint, zmq.strerror(error.errno or 0)) from error
            hub = cls(socket, max_message_bytes=max_message_bytes, limits=limits, keyed=keys is not None)
            try:
                yield hub
            finally:
                hub._socket.close()
        finally:
            if doorkeeper is not None:
                doorkeeper.close()
            await close(context, socket)

    async def receive(self) -> Received:
        """The next message that is fit to be handled; all others are refused and counted."""
        while True:
            sender, *content = await self._socket.receive()
            peer, parts = sender.bytes, [frame.buffer for frame in content]
            message = self._read(peer, parts)
            if not isinstance(message, Refuse):
                key = proven_key(content[0]) if self._keyed else None
                return Received(peer, message, tuple(parts[1:]), key)
            self.refused[message.reason] += 1
            if message.reason != "too_fast" or message.about or self._meter is None or self._meter.tells(peer):
                await self.send(peer, message)

    async def send(self, peer: bytes, message: HubMessage, frames: Sequence[Frame] = ()) -> bool:
        """Hand a message to the network; False when the peer is not connected, or takes nothing. Frames must not change
        afterwards.
        """
        parts = [peer, message.model_dump_json().encode(), *frames]
        size = sum(len(frame) for frame in frames if len(frame) >= TRACKED_BYTES)
        sent = self._socket.send(parts, track=size > 0)
        if isinstance(sent, zmq.MessageTracker):
            self._backlogs.add(peer, sent, size)
        return bool(sent)

    def _read(self, peer: bytes, parts: Sequence[memoryview]) -> HubInput | Refuse:
        if self._meter is not None:
            refusal = self._meter.refusal(peer, sum(part.nbytes for part in parts), time.monotonic())
            if refusal is not None:
                return refusal
        message = read_for_hub(parts, max_message_bytes=self._max_message_bytes)
        if isinstance(message, ChunkRequest):
            return self._backlogs.refusal(peer, message) or message
        return message


class HubClient:
    """An actor's end."""

    def __init__(self, socket: zmq.Socket[bytes], endpoint: str) -> None:
        self._socket = AsyncSocket(socket)
        self._endpoint = endpoint
        self.refused: Counter[str] = Counter()
        """Messages of the hub that made no sense, by reason; they are skipped."""

    @classmethod
    @asynccontextmanager
    async def connect(
        cls, endpoint: str, *, keys: ActorKeys | None = None, deadline_s: float = 30.0
    ) -> AsyncIterator[Self]:
        """Connect and wait until the hub has let us in; from then on ZeroMQ reconnects by itself.

        Raises `KeysNeeded`, `WrongKey`, or `HubUnreachable` after `deadline_s` seconds.
        """
        check_endpoint(endpoint, keys)
        context = zmq.Context()
        socket = context.socket(zmq.DEALER)
        try:
            set_common_options(socket, endpoint)
            socket.sndhwm, socket.rcvhwm = 0, 0
            socket.maxmsgsize = _LARGEST_ANSWER_BYTES
            # Nothing is queued for a hub that is away: whoever sent it sends it again, to the hub that comes back.
            socket.immediate = True
            if keys is not None:
                socket.curve_publickey = keys.pair.public.encode()
                socket.curve_secretkey = keys.pair.secret.encode()
                socket.curve_serverkey = keys.hub.encode()
            client = cls(socket, endpoint)
            watcher = HandshakeWatcher(socket, client._socket.wake)
            try:
                socket.connect(endpoint)
                await client._handshake(watcher, keys, deadline_s)
                yield client
            finally:
                watcher.close()
                client._socket.close()
        finally:
            await close(context, socket)

    @property
    def connected(self) -> bool:
        """Whether the hub is there now."""
        return self._socket.ready(zmq.POLLOUT)

    async def wait_connected(self) -> None:
        """Until the hub is there. Bound it with a deadline of your own."""
        await self._socket.until(lambda: self.connected)

    async def send(self, message: ActorMessage, frames: Sequence[Frame] = ()) -> bool:
        """Hand a message to the network; False when the hub is away: nothing was queued, send it again later.

        Frames must not change afterwards.
        """
        return self.connected and bool(self._socket.send([message.model_dump_json().encode(), *frames]))

    async def receive(self) -> tuple[HubMessage, tuple[memoryview, ...]]:
        """The hub's next message. Cancelling (a deadline) loses none."""
        while True:
            header, *frames = await self._socket.receive()
            message = read_from_hub(header.buffer, self.refused)
            if message is not None:
                return message, tuple(frame.buffer for frame in frames)

    async def _handshake(self, watcher: HandshakeWatcher, keys: ActorKeys | None, deadline_s: float) -> None:
        with anyio.move_on_after(deadline_s):
            greeted = False
            while not await self._let_in(watcher):
                before, greeted = greeted, keys is not None and await greets(self._endpoint)
                if watcher.refused or (before and greeted):  # a hub that is there and hangs up: it holds another key
                    raise WrongKey(self._endpoint, keys)
            return
        raise HubUnreachable(self._endpoint, deadline_s)

    async def _let_in(self, watcher: HandshakeWatcher) -> bool:
        """Until the hub has let us in; False when the next handshake has failed."""
        so_far = watcher.broken_off
        await self._socket.until(lambda: self.connected or watcher.refused or watcher.broken_off > so_far)
        return self.connected


class TrainerLink:
    """The trainer's end: one question at a time, asked again until answered, because every one may be asked twice."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._open()
        self.refused: Counter[str] = Counter()
        """Answers that made no sense, by reason; the question was asked again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close(linger=0)
        self._context.term()

    def request(
        self, message: TrainerMessage, frames: Sequence[Frame] = (), *, deadline_s: float, waiting_for: str
    ) -> tuple[HubMessage, tuple[memoryview, ...]]:
        """Ask and wait for the answer. Raises `HubSilent`, naming `waiting_for`, after `deadline_s` seconds.

        Unanswered questions are asked again after 2 s, 4 s, … 30 s, each time from a new socket: an answer to an
        earlier question can never be taken for one to this.
        """
        parts = [message.model_dump_json().encode(), *frames]
        started = time.monotonic()
        patience_s = _FIRST_PATIENCE_S
        while True:
            left_s = started + deadline_s - time.monotonic()
            if left_s <= 0:
                raise HubSilent(self._endpoint, message.kind, deadline_s, waiting_for)
            self._socket.send_multipart(parts, copy=False)
            if self._socket.poll(int(1000 * min(patience_s, left_s)) + 1):
                received = receive(self._socket)
                answer = None if received is None else read_from_hub(received[0].buffer, self.refused)
                if received is not None and answer is not None:
                    return answer, tuple(frame.buffer for frame in received[1:])
            self._socket.close(linger=0)
            self._socket = self._open()
            patience_s = min(2 * patience_s, _LAST_PATIENCE_S)

    def _open(self) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        set_common_options(socket, self._endpoint)
        socket.sndhwm, socket.rcvhwm = 0, 0
        socket.connect(self._endpoint)
        return socket
