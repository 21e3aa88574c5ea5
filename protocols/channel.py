"""The sockets between actors, hub and trainer: the hub answers what it cannot accept and is never ended by it; a peer
that is gone, a wrong key or a silent hub is a named error, not a hang."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import anyio
import anyio.lowlevel
import anyio.to_thread
import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from protocols.keys import ActorKeys, HubKeys, KeyPair, write_keys
from protocols.messages import ActorMessage, HubMessage, Refuse, TrainerMessage
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
    check_identity,
    is_local,
    read_for_hub,
    read_from_hub,
)

__all__ = [
    "CannotListen", "ChannelError", "Frame", "HubClient", "HubInput", "HubSilent", "HubSocket", "HubUnreachable",
    "KeysNeeded", "Received", "TrainerLink", "WrongKey", "is_local", "new_keys",
]  # fmt: skip

_LINGER_MS: Final = 1000
"""How long closing waits for what was sent last: a Drain or Goodbye should arrive, a dead peer should not hold us."""
_FIRST_PATIENCE_S: Final = 2.0
_LAST_PATIENCE_S: Final = 30.0
_ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"


def new_keys(directory: Path) -> None:
    """Make a hub pair and a first, allowed actor pair in `directory`. Raises `BadKeys` where keys exist already."""
    write_keys(directory, hub=_new_pair(), actor=_new_pair())


def _new_pair() -> KeyPair:
    public, secret = zmq.curve_keypair()
    return KeyPair(public=public.decode(), secret=secret.decode())


class _AsyncSocket:
    """A ZeroMQ socket for tasks. Its descriptor signals edges only, and any operation on the socket may swallow one, so
    `_notice` follows each. A message is taken only when its waiter runs: cancelling one loses nothing.
    """

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._changed = anyio.Event()
        self.close = _on_readable(socket, self._notice)

    def ready(self, events: int) -> bool:
        return _ready(self._socket, events)

    def wake(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    async def receive(self) -> list[memoryview]:
        while True:
            await anyio.lowlevel.checkpoint()  # a peer that never stops sending must not starve the other tasks
            await self.until(lambda: self.ready(zmq.POLLIN))
            parts = _receive(self._socket)
            self._notice()
            if parts is not None:
                return parts

    def send(self, parts: Sequence[Frame]) -> bool:
        """False when there is nobody to send to."""
        try:
            self._socket.send_multipart(parts, flags=zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        finally:
            self._notice()
        return True

    def _notice(self) -> None:
        if self.ready(zmq.POLLIN | zmq.POLLOUT):
            self.wake()


class HubSocket:
    """The hub's end. One `receive` loop, any number of senders."""

    def __init__(self, socket: zmq.Socket[bytes], *, max_message_bytes: int) -> None:
        self._socket = _AsyncSocket(socket)
        self._max_message_bytes = max_message_bytes
        self.endpoint: str = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        """Where peers connect, a free port filled in."""
        self.refused: Counter[str] = Counter()
        """Messages answered by `Refuse` here, by reason."""

    @classmethod
    @asynccontextmanager
    async def bind(
        cls, endpoint: str, *, keys: HubKeys | None = None, max_message_bytes: int = 256 * 2**20
    ) -> AsyncIterator[Self]:
        """Listen. Raises `KeysNeeded` beyond this machine without keys, `CannotListen` where the address is taken."""
        check_endpoint(endpoint, keys)
        context = zmq.Context()
        zap = None if keys is None else _Doorkeeper(context, keys)
        socket = context.socket(zmq.ROUTER)
        try:
            _set_common_options(socket, endpoint)
            # Credits bound memory: at a send mark ROUTER drops silently; at a receive mark it only makes peers wait.
            socket.sndhwm, socket.rcvhwm = 0, 64
            socket.router_mandatory = True
            socket.router_handover = True
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
            hub = cls(socket, max_message_bytes=max_message_bytes)
            try:
                yield hub
            finally:
                hub._socket.close()
        finally:
            if zap is not None:
                zap.close()
            await _close(context, socket)

    async def receive(self) -> Received:
        """The next message that is fit to be handled; all others are answered by `Refuse` and counted."""
        while True:
            sender, *parts = await self._socket.receive()
            peer = bytes(sender)
            message = read_for_hub(parts, max_message_bytes=self._max_message_bytes)
            if not isinstance(message, Refuse):
                return Received(peer, message, tuple(parts[1:]))
            self.refused[message.reason] += 1
            await self.send(peer, message)

    async def send(self, peer: bytes, message: HubMessage, frames: Sequence[Frame] = ()) -> bool:
        """Hand a message to the network; False when the peer is not connected. Frames must not change afterwards."""
        return self._socket.send([peer, message.model_dump_json().encode(), *frames])


class HubClient:
    """An actor's end."""

    def __init__(self, socket: zmq.Socket[bytes], endpoint: str) -> None:
        self._socket = _AsyncSocket(socket)
        self._endpoint = endpoint
        self.refused: Counter[str] = Counter()
        """Messages of the hub that made no sense, by reason; they are skipped."""

    @classmethod
    @asynccontextmanager
    async def connect(
        cls, endpoint: str, *, identity: str, keys: ActorKeys | None = None, deadline_s: float = 30.0
    ) -> AsyncIterator[Self]:
        """Connect and wait until the hub has let us in; from then on ZeroMQ reconnects by itself.

        Raises `KeysNeeded`, `WrongKey`, or `HubUnreachable` after `deadline_s` seconds.
        """
        check_endpoint(endpoint, keys)
        check_identity(identity)
        context = zmq.Context()
        socket = context.socket(zmq.DEALER)
        try:
            _set_common_options(socket, endpoint)
            socket.sndhwm, socket.rcvhwm = 0, 0
            # Nothing is queued for a hub that is away: whoever sent it sends it again, to the hub that comes back.
            socket.immediate = True
            socket.routing_id = identity.encode()
            if keys is not None:
                socket.curve_publickey = keys.pair.public.encode()
                socket.curve_secretkey = keys.pair.secret.encode()
                socket.curve_serverkey = keys.hub.encode()
            client = cls(socket, endpoint)
            watcher = _HandshakeWatcher(socket, client._socket.wake)
            try:
                socket.connect(endpoint)
                await client._handshake(watcher, keys, deadline_s)
                yield client
            finally:
                watcher.close()
                client._socket.close()
        finally:
            await _close(context, socket)

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
        return self.connected and self._socket.send([message.model_dump_json().encode(), *frames])

    async def receive(self) -> tuple[HubMessage, tuple[memoryview, ...]]:
        """The hub's next message. Cancelling (a deadline) loses none."""
        while True:
            header, *frames = await self._socket.receive()
            message = read_from_hub(header, self.refused)
            if message is not None:
                return message, tuple(frames)

    async def _handshake(self, watcher: _HandshakeWatcher, keys: ActorKeys | None, deadline_s: float) -> None:
        with anyio.move_on_after(deadline_s):
            await self._socket.until(lambda: self.connected or watcher.hopeless)
        if self.connected:
            return
        raise WrongKey(self._endpoint, keys) if watcher.hopeless else HubUnreachable(self._endpoint, deadline_s)


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
                received = _receive(self._socket)
                answer = None if received is None else read_from_hub(received[0], self.refused)
                if received is not None and answer is not None:
                    return answer, tuple(received[1:])
            self._socket.close(linger=0)
            self._socket = self._open()
            patience_s = min(2 * patience_s, _LAST_PATIENCE_S)

    def _open(self) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        _set_common_options(socket, self._endpoint)
        socket.sndhwm, socket.rcvhwm = 0, 0
        socket.connect(self._endpoint)
        return socket


class _Doorkeeper:
    """ZAP: tells libzmq which actor keys may come in (https://rfc.zeromq.org/spec/27)."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: HubKeys) -> None:
        self._keys = keys
        self._socket = context.socket(zmq.REP)
        self._socket.bind(_ZAP_ENDPOINT)
        self._unwatch = _on_readable(self._socket, self._answer_all)

    def close(self) -> None:
        self._unwatch()
        self._socket.close(linger=0)

    def _answer_all(self) -> None:
        while _ready(self._socket, zmq.POLLIN):
            version, request, _domain, _address, _identity, mechanism, *credentials = self._socket.recv_multipart()
            verdict = [b"200", b"OK"] if self._knows(mechanism, credentials) else [b"400", b"key not allowed"]
            self._socket.send_multipart([version, request, *verdict, b"", b""])

    def _knows(self, mechanism: bytes, credentials: Sequence[bytes]) -> bool:
        try:
            return mechanism == b"CURVE" and self._keys.allows(z85.encode(credentials[0]).decode())
        except OSError:  # an unreadable list lets nobody in, and the next handshake reads it again
            return False


class _HandshakeWatcher:
    """Notices that the hub answers but will never let us in."""

    def __init__(self, socket: zmq.Socket[bytes], wake: Callable[[], None]) -> None:
        self._wake = wake
        self._refused = False
        self._broken_off = 0
        self._socket = socket
        self._monitor = socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        )
        self._unwatch = _on_readable(self._monitor, self._note)

    @property
    def hopeless(self) -> bool:
        """Refused, or three handshakes broken off: a hub that holds another key just hangs up."""
        return self._refused or self._broken_off >= 3

    def close(self) -> None:
        self._unwatch()
        self._socket.disable_monitor()
        self._monitor.close(linger=0)

    def _note(self) -> None:
        while _ready(self._monitor, zmq.POLLIN):
            event = parse_monitor_message(self._monitor.recv_multipart())["event"]
            self._refused |= event in (zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
            self._broken_off += 1
        self._wake()


def _on_readable(socket: zmq.Socket[bytes], callback: Callable[[], None]) -> Callable[[], None]:
    """Have the event loop run `callback` when something happened to the socket; returns what ends that."""
    loop, descriptor = asyncio.get_running_loop(), socket.fileno()
    loop.add_reader(descriptor, callback)
    callback()  # libzmq signals only those who have looked at the events once

    def stop() -> None:
        loop.remove_reader(descriptor)

    return stop


def _ready(socket: zmq.Socket[bytes], flags: int) -> bool:
    events = socket.getsockopt(zmq.EVENTS)
    assert isinstance(events, int), "ZMQ_EVENTS is an int"
    return bool(events & flags)


def _set_common_options(socket: zmq.Socket[bytes], endpoint: str) -> None:
    socket.linger = _LINGER_MS
    socket.reconnect_ivl, socket.reconnect_ivl_max = 100, 2000
    socket.ipv6 = "[" in endpoint
    # Half-open connections (a machine that vanished) are noticed by libzmq's own thread, however busy Python is.
    socket.heartbeat_ivl, socket.heartbeat_timeout = 5_000, 20_000


def _receive(socket: zmq.Socket[bytes]) -> list[memoryview] | None:
    try:
        return [frame.buffer for frame in socket.recv_multipart(zmq.NOBLOCK, copy=False)]
    except zmq.Again:
        return None


async def _close(context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes]) -> None:
    socket.close(linger=_LINGER_MS)
    with anyio.CancelScope(shield=True):
        await anyio.to_thread.run_sync(context.term)
