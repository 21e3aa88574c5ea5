"""The sockets between actors, hub and trainer: the hub answers what it cannot accept and is never ended by it; a peer
that is gone, a wrong key or a silent hub is a named error, not a hang."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
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
    WrongKey,
    check_keys,
    is_local,
    read_for_hub,
    read_from_hub,
)

__all__ = [
    "CannotListen",
    "ChannelError",
    "Frame",
    "HubClient",
    "HubInput",
    "HubSilent",
    "HubSocket",
    "HubUnreachable",
    "KeysNeeded",
    "Received",
    "TrainerLink",
    "WrongKey",
    "is_local",
    "new_keys",
]

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


class _Waker:
    """Lets tasks wait for a ZeroMQ socket. Its file descriptor signals edges only, and any operation on the socket may
    swallow one, so `notice` is called after each. Nothing is received before the waiter runs: cancelling loses nothing.
    """

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._changed = anyio.Event()
        self._loop = asyncio.get_running_loop()
        self._descriptor = socket.fileno()
        self._loop.add_reader(self._descriptor, self.notice)

    def ready(self, flag: zmq.PollEvent) -> bool:
        return _ready(self._socket, flag)

    def notice(self) -> None:
        if _ready(self._socket, zmq.POLLIN | zmq.POLLOUT):
            self.wake()

    def wake(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    def close(self) -> None:
        self._loop.remove_reader(self._descriptor)


@dataclass(frozen=True, slots=True)
class Received:
    """One accepted message of an actor or the trainer."""

    peer: bytes
    """Routing id to answer to: an actor's id, or an invented one for the trainer."""
    message: HubInput
    frames: tuple[memoryview, ...]


class HubSocket:
    """The hub's end. One `receive` loop, any number of senders."""

    def __init__(self, socket: zmq.Socket[bytes], *, max_message_bytes: int) -> None:
        self._socket = socket
        self._waker = _Waker(socket)
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
        check_keys(endpoint, keys)
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
                raise CannotListen(
                    f"cannot listen on {endpoint}: {error.strerror}; set hub.listen to a free address of this machine"
                ) from error
            hub = cls(socket, max_message_bytes=max_message_bytes)
            try:
                yield hub
            finally:
                hub._waker.close()
        finally:
            if zap is not None:
                zap.close()
            await _close(context, socket)

    async def receive(self) -> Received:
        """The next message that is fit to be handled; all others are answered by `Refuse` and counted."""
        while True:
            await anyio.lowlevel.checkpoint()
            await self._waker.until(lambda: self._waker.ready(zmq.POLLIN))
            parts = _receive(self._socket)
            self._waker.notice()
            if parts is None:
                continue
            peer = bytes(parts[0])
            message = read_for_hub(parts[1:], max_message_bytes=self._max_message_bytes)
            if not isinstance(message, Refuse):
                return Received(peer, message, tuple(parts[2:]))
            self.refused[message.reason] += 1
            await self.send(peer, message)

    async def send(self, peer: bytes, message: HubMessage, frames: Sequence[Frame] = ()) -> bool:
        """Hand a message to the network; False when the peer is not connected. Frames must not change afterwards."""
        try:
            self._socket.send_multipart(
                [peer, message.model_dump_json().encode(), *frames], flags=zmq.NOBLOCK, copy=False
            )
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        finally:
            self._waker.notice()
        return True


class HubClient:
    """An actor's end."""

    def __init__(self, socket: zmq.Socket[bytes], endpoint: str) -> None:
        self._socket = socket
        self._waker = _Waker(socket)
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
        check_keys(endpoint, keys)
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
            watcher = _HandshakeWatcher(socket, client._waker.wake)
            try:
                _connect(socket, endpoint)
                await client._handshake(watcher, keys, deadline_s)
                yield client
            finally:
                watcher.close(socket)
                client._waker.close()
        finally:
            await _close(context, socket)

    @property
    def connected(self) -> bool:
        """Whether the hub is there now."""
        return self._waker.ready(zmq.POLLOUT)

    async def wait_connected(self) -> None:
        """Until the hub is there. Bound it with a deadline of your own."""
        await self._waker.until(lambda: self.connected)

    async def send(self, message: ActorMessage, frames: Sequence[Frame] = ()) -> bool:
        """Hand a message to the network; False when the hub is away: nothing was queued, send it again later.

        Frames must not change afterwards.
        """
        if not self.connected:
            return False
        try:
            self._socket.send_multipart([message.model_dump_json().encode(), *frames], flags=zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        finally:
            self._waker.notice()
        return True

    async def receive(self) -> tuple[HubMessage, tuple[memoryview, ...]]:
        """The hub's next message. Cancelling (a deadline) loses none."""
        while True:
            await anyio.lowlevel.checkpoint()
            await self._waker.until(lambda: self._waker.ready(zmq.POLLIN))
            parts = _receive(self._socket)
            self._waker.notice()
            message = None if parts is None else read_from_hub(parts[0], self.refused)
            if parts is not None and message is not None:
                return message, tuple(parts[1:])

    async def _handshake(self, watcher: _HandshakeWatcher, keys: ActorKeys | None, deadline_s: float) -> None:
        with anyio.move_on_after(deadline_s):
            await self._waker.until(lambda: self.connected or watcher.hopeless)
        if self.connected:
            return
        if watcher.hopeless:
            if keys is None:
                raise WrongKey(
                    f"hub at {self._endpoint} wants keys; set hub.key_dir to the directory of its `matpo keys new`"
                )
            raise WrongKey(
                f"hub at {self._endpoint} does not accept the key {keys.pair.public}; run `matpo keys allow"
                f" '{keys.pair.public}'` there, and check that actor.key was made with its hub.key"
            )
        raise HubUnreachable(
            f"no hub answered at {self._endpoint} within {deadline_s:g} s; start matpo-learner or correct --hub"
        )


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
                raise HubSilent(
                    f"hub at {self._endpoint} has not answered {message.kind} for {deadline_s:g} s (waiting for"
                    f" {waiting_for}); see `matpo doctor` and the hub's log"
                )
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
        _connect(socket, self._endpoint)
        return socket


class _Doorkeeper:
    """ZAP: tells libzmq which actor keys may come in (https://rfc.zeromq.org/spec/27)."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: HubKeys) -> None:
        self._keys = keys
        self._socket = context.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.bind(_ZAP_ENDPOINT)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self._answer_all)

    def _answer_all(self) -> None:
        while _ready(self._socket, zmq.POLLIN):
            version, request, _domain, _address, _identity, mechanism, *credentials = self._socket.recv_multipart()
            known = mechanism == b"CURVE" and self._keys.allows(z85.encode(credentials[0]).decode())
            verdict = [b"200", b"OK"] if known else [b"400", b"key not allowed"]
            self._socket.send_multipart([version, request, *verdict, b"", b""])

    def close(self) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close(linger=0)


class _HandshakeWatcher:
    """Notices that the hub answers but will never let us in."""

    def __init__(self, socket: zmq.Socket[bytes], wake: Callable[[], None]) -> None:
        self._wake = wake
        self._rejected = False
        self._failures = 0
        self._monitor = socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        )
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._monitor.fileno(), self._note)

    @property
    def hopeless(self) -> bool:
        """Refused by key, or three handshakes broken off: a hub that holds another key just hangs up."""
        return self._rejected or self._failures >= 3

    def _note(self) -> None:
        while _ready(self._monitor, zmq.POLLIN):
            event = parse_monitor_message(self._monitor.recv_multipart())["event"]
            self._rejected |= event == zmq.EVENT_HANDSHAKE_FAILED_AUTH
            self._failures += 1
        self._wake()

    def close(self, socket: zmq.Socket[bytes]) -> None:
        self._loop.remove_reader(self._monitor.fileno())
        socket.disable_monitor()
        self._monitor.close(linger=0)


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


def _connect(socket: zmq.Socket[bytes], endpoint: str) -> None:
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        raise HubUnreachable(
            f"hub address {endpoint!r} cannot be used: {error.strerror}; expected tcp://HOST:PORT"
        ) from error


def _receive(socket: zmq.Socket[bytes]) -> list[memoryview] | None:
    try:
        return [frame.buffer for frame in socket.recv_multipart(zmq.NOBLOCK, copy=False)]
    except zmq.Again:
        return None


async def _close(context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes]) -> None:
    socket.close(linger=_LINGER_MS)
    with anyio.CancelScope(shield=True):
        await anyio.to_thread.run_sync(context.term)
