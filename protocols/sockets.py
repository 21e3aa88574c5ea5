"""What the ends of a channel need of libzmq: sockets for tasks, who may come in, and why a handshake fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final
from urllib.parse import urlsplit

import anyio
import anyio.lowlevel
import anyio.to_thread
import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from protocols.keys import BadKeys, HubKeys, KeyPair
from protocols.refusals import Frame

_LINGER_MS: Final = 1000
"""How long closing waits for what was sent last: a Drain or Goodbye should arrive, a dead peer should not hold us."""
_ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"
_USER_ID: Final = "User-Id"
"""Property of a received frame: the public key that `Doorkeeper` let in."""
_GREETING_S: Final = 5.0
_SIGNATURE: Final = b"\xff"
TRACKED_BYTES: Final = zmq.COPY_THRESHOLD
"""Smaller frames are copied when sent; larger ones are held until the network has taken them."""


def new_pair() -> KeyPair:
    """A fresh CURVE25519 pair. Its public key begins with no dash: it is written on command lines."""
    public, secret = zmq.curve_keypair()
    while public.startswith(b"-"):
        public, secret = zmq.curve_keypair()
    return KeyPair(public=public.decode(), secret=secret.decode())


class AsyncSocket:
    """A ZeroMQ socket for tasks. Its descriptor signals edges only, and any operation on the socket may swallow one, so
    `_notice` follows each. A message is taken only when its waiter runs: cancelling one loses nothing.
    """

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._changed = anyio.Event()
        self.close = on_readable(socket, self._notice)

    def ready(self, events: int) -> bool:
        return _ready(self._socket, events)

    def wake(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    async def receive(self) -> list[zmq.Frame]:
        while True:
            await anyio.lowlevel.checkpoint()  # a peer that never stops sending must not starve the other tasks
            await self.until(lambda: self.ready(zmq.POLLIN))
            parts = receive(self._socket)
            self._notice()
            if parts is not None:
                return parts

    def send(self, parts: Sequence[Frame], *, track: bool = False) -> zmq.MessageTracker | bool:
        """False when there is nobody to send to, or one who takes nothing. `track`: a tracker instead of True, which
        tells when the network has let go of the parts.
        """
        try:
            tracker = self._socket.send_multipart(parts, flags=zmq.NOBLOCK, copy=False, track=track)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        finally:
            self._notice()
        return tracker or True

    def _notice(self) -> None:
        if self.ready(zmq.POLLIN | zmq.POLLOUT):
            self.wake()


class Doorkeeper:
    """ZAP: tells libzmq which actor keys may come in (https://rfc.zeromq.org/spec/27)."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: HubKeys) -> None:
        self._keys = keys
        self._socket = context.socket(zmq.REP)
        self._socket.bind(_ZAP_ENDPOINT)
        self._unwatch = on_readable(self._socket, self._answer_all)

    def close(self) -> None:
        self._unwatch()
        self._socket.close(linger=0)

    def _answer_all(self) -> None:
        while _ready(self._socket, zmq.POLLIN):
            version, request, _domain, _address, _identity, mechanism, *credentials = self._socket.recv_multipart()
            key = z85.encode(credentials[0]) if mechanism == b"CURVE" else b""
            verdict = [b"200", b"OK", key] if key and self._knows(key.decode()) else [b"400", b"key not allowed", b""]
            self._socket.send_multipart([version, request, *verdict, b""])

    def _knows(self, key: str) -> bool:
        try:
            return self._keys.allows(key)
        except (OSError, BadKeys):  # a list that cannot be read lets nobody in; the next handshake reads it again
            return False


class HandshakeWatcher:
    """Notices that handshakes fail, and whether the hub said why."""

    def __init__(self, socket: zmq.Socket[bytes], wake: Callable[[], None]) -> None:
        self._wake = wake
        self.refused = False
        """The hub answered that it wants a key, none, or another one."""
        self.broken_off = 0
        """Handshakes that the other end hung up on: a hub that holds another key does, and so does a cut link."""
        self._socket = socket
        self._monitor = socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        )
        self._unwatch = on_readable(self._monitor, self._note)

    def close(self) -> None:
        self._unwatch()
        self._socket.disable_monitor()
        self._monitor.close(linger=0)

    def _note(self) -> None:
        while _ready(self._monitor, zmq.POLLIN):
            event = parse_monitor_message(self._monitor.recv_multipart())["event"]
            self.refused |= event in (zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
            self.broken_off += event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        self._wake()


async def greets(endpoint: str) -> bool:
    """Whether a ZeroMQ peer is at a tcp endpoint now: it sends its signature before any handshake (ZMTP 3.1, §3.2)."""
    place = urlsplit(endpoint)
    with anyio.move_on_after(_GREETING_S), suppress(OSError, anyio.EndOfStream, anyio.BrokenResourceError):
        async with await anyio.connect_tcp(str(place.hostname), int(place.port or 0)) as stream:
            return (await stream.receive(1)) == _SIGNATURE
    return False


def on_readable(socket: zmq.Socket[bytes], callback: Callable[[], None]) -> Callable[[], None]:
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


def set_common_options(socket: zmq.Socket[bytes], endpoint: str) -> None:
    """What all our sockets have in common."""
    socket.linger = _LINGER_MS
    socket.reconnect_ivl, socket.reconnect_ivl_max = 100, 2000
    socket.ipv6 = "[" in endpoint
    # Half-open connections (a machine that vanished) are noticed by libzmq's own thread, however busy Python is.
    socket.heartbeat_ivl, socket.heartbeat_timeout = 5_000, 20_000


def receive(socket: zmq.Socket[bytes]) -> list[zmq.Frame] | None:
    """A message that is there, as frames that are not copied; None if there is none."""
    try:
        return socket.recv_multipart(zmq.NOBLOCK, copy=False)
    except zmq.Again:
        return None


def proven_key(frame: zmq.Frame) -> str:
    """The public key whose owner sent the frame; only for sockets with a `Doorkeeper`."""
    key = frame.get(_USER_ID)
    assert isinstance(key, str), "every frame that the doorkeeper let in has the key it named"
    return key


async def close(context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes]) -> None:
    """Close both; what was sent last has a second to arrive."""
    socket.close(linger=_LINGER_MS)
    with anyio.CancelScope(shield=True):
        await anyio.to_thread.run_sync(context.term)
