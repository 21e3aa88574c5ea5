"""Thousands of HTTP/1.1 requests in flight to one server: a kept-alive connection each, a few µs of Python per request.

A general client costs about three times as much for the same (`benchmarks/engine_client.py`). No redirects, proxies,
cookies or compression: a server of our own does not need them.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, Literal, Self, cast
from urllib.parse import urlsplit

import anyio

KEEP_ALIVE_S: Final = 3.0
"""The server closes a connection idle for 5 s; ours must be gone by then, or a request would meet the closing end."""
CONNECT_TIMEOUT_S: Final = 60.0
"""Long: thousands of requests at once overflow the queue of a server that accepts slowly; the system tries again."""
LARGEST_HEAD_BYTES: Final = 64 * 2**10
END_OF_HEAD: Final = b"\r\n\r\n"
STATUS_LINE: Final = re.compile(rb"HTTP/1\.([01]) ([1-5]\d\d)(?: [^\r\n]*)?(?=\r\n|\Z)")
FIELDS: Final = re.compile(rb"\r\n(connection|content-length|transfer-encoding):[ \t]*([^\r\n]*)", re.IGNORECASE)
"""The fields that say where a reply ends."""
CHUNK_LINE: Final = re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(?:;.*)?")
Method = Literal["GET", "POST"]


class Broken(Exception):
    """No connection, or it ended before the reply did."""


class Refused(Exception):
    """The server answered with another status than 200."""

    def __init__(self, status: int, content: bytes) -> None:
        super().__init__(f"HTTP {status}")
        self.status, self.content = status, content


class BadReply(Exception):
    """What arrived is not the HTTP we understand."""


class Reply:
    """One response, cut out of bytes as they arrive."""

    __slots__ = ("_body", "_kept", "_left", "_mode", "_reusable", "finished", "status")

    def __init__(self) -> None:
        self.status = 0
        """0 until the head is here."""
        self.finished = False
        self._mode: Literal["length", "chunk", "between", "trailer", "end"] = "length"
        self._left = 0
        """Bytes of the body, or of its current chunk, that are still to come."""
        self._kept = b""
        """The beginning of a head or line that is not complete."""
        self._body: list[bytes] = []
        self._reusable = True

    @property
    def reusable(self) -> bool:
        """Whether the connection may carry another request."""
        return self.finished and self._reusable

    def take(self) -> bytes:
        """The body as far as it arrived since the last call."""
        body, self._body = self._body, []
        return body[0] if len(body) == 1 else b"".join(body)

    def feed(self, data: bytes) -> None:
        """Take what arrived. Raises `BadReply`."""
        if self._kept:
            data, self._kept = self._kept + data, b""
        while not self.status:
            end = data.find(END_OF_HEAD)
            if end < 0:
                self._keep(data)
                return
            self._read_head(data[:end])
            data = data[end + len(END_OF_HEAD) :]
        if self._mode == "length":
            self._take_counted(data)
        elif self._mode == "end":
            self._body.append(data)
        else:
            self._take_chunks(data)

    def end(self) -> bool:
        """The connection is closed. Whether that completes the reply."""
        if self.status and self._mode == "end":
            self.finished = True
        return self.finished

    def _read_head(self, head: bytes) -> None:
        found = STATUS_LINE.match(head)
        if found is None:
            raise BadReply(f"the reply begins with {head[:60]!r}")
        status = int(found[2])
        if status < 200:
            return
        fields = {name.lower(): value.rstrip() for name, value in FIELDS.findall(head)}
        connection = fields.get(b"connection", b"").lower()
        self._reusable = connection != b"close" and (found[1] == b"1" or connection == b"keep-alive")
        length = fields.get(b"content-length")
        if fields.get(b"transfer-encoding", b"identity").lower() == b"chunked":
            self._mode = "between"
        elif length is not None:
            if not length.isdigit():
                raise BadReply(f"the reply's length is {length[:60]!r}")
            self._left = int(length)
        elif status != 204:
            self._mode, self._reusable = "end", False
        self.status = status

    def _take_counted(self, data: bytes) -> None:
        if len(data) > self._left:
            raise BadReply("the reply is longer than it said")
        if data:
            self._body.append(data)
            self._left -= len(data)
        self.finished = not self._left

    def _take_chunks(self, data: bytes) -> None:
        at = 0
        while not self.finished and at < len(data):
            if self._mode == "chunk":
                part = data[at : at + self._left]
                self._body.append(part)
                self._left -= len(part)
                at += len(part)
                if not self._left:
                    self._mode = "between"
                continue
            end = data.find(b"\r\n", at)
            if end < 0:
                self._keep(data[at:])
                return
            self._read_line(data[at:end])
            at = end + 2
        if at < len(data):
            raise BadReply("the reply is longer than it said")

    def _read_line(self, line: bytes) -> None:
        """The size of a chunk, the empty end of the one before, or a line after the last."""
        if self._mode == "trailer":
            self.finished = not line
        elif line:
            found = CHUNK_LINE.fullmatch(line)
            if found is None:
                raise BadReply(f"a chunk begins with {line[:60]!r}")
            self._left = int(found[1], 16)
            self._mode = "chunk" if self._left else "trailer"

    def _keep(self, data: bytes) -> None:
        if len(data) > LARGEST_HEAD_BYTES:
            raise BadReply(f"a line or head of the reply has more than {LARGEST_HEAD_BYTES} bytes")
        self._kept = data


class Connection(asyncio.Protocol):
    """One connection: at most one request at a time."""

    __slots__ = ("_idle", "_transport", "_waiter", "idle_since", "lost", "reply")

    def __init__(self, idle: dict[Connection, None]) -> None:
        self.reply: Reply | None = None
        """Of the request under way."""
        self.lost: str | None = None
        """Why it can be used no more."""
        self.idle_since = 0.0
        self._idle = idle
        self._waiter: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name

    def data_received(self, data: bytes) -> None:
        reply = self.reply
        if reply is None:
            self.close("the server sends without being asked")
            return
        try:
            reply.feed(data)
        except BadReply as error:
            self.close(str(error))
            return
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        if self.lost is None:
            self.lost = str(error) if error else "the server closed the connection"
        if self.reply is not None:
            self.reply.end()
        self._idle.pop(self, None)
        self._wake()

    def send(self, request: bytes) -> Reply:
        """Begin a request."""
        self.reply = reply = Reply()
        self._transport.write(request)
        return reply

    async def receive(self) -> None:
        """Until more of the reply is here. Raises `Broken`."""
        if self.lost is not None:
            raise Broken(self.lost)
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def close(self, reason: str) -> None:
        """Drop it, whatever is under way."""
        if self.lost is None:
            self.lost = reason
        self._transport.abort()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class HttpClient:
    """One server. Deadlines are the caller's; a request whose caller is cancelled loses its connection."""

    def __init__(self, url: str) -> None:
        """`url` is http[s]://host[:port][/prefix]."""
        self._idle: dict[Connection, None] = {}
        """The one used last at the end."""
        self.clock = time.monotonic
        self.url = url

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str) -> AsyncIterator[Self]:
        """A client whose connections are gone at the end."""
        client = cls(url)
        try:
            yield client
        finally:
            client.close()

    @property
    def url(self) -> str:
        """Of the server; may be set, then the next request goes there."""
        return self._url

    @url.setter
    def url(self, url: str) -> None:
        self.close()
        self._url = url.rstrip("/")
        parts = urlsplit(self._url)
        self._secure = parts.scheme == "https"
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if self._secure else 80)
        host, path = parts.netloc.rpartition("@")[2], parts.path
        self._heads: dict[Method, tuple[str, str]] = {
            "GET": (f"GET {path}", f" HTTP/1.1\r\nHost: {host}\r\n\r\n"),
            "POST": (
                f"POST {path}",
                f" HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: ",
            ),
        }

    @property
    def idle(self) -> int:
        """Connections that wait for a request."""
        return len(self._idle)

    def close(self) -> None:
        """Drop the idle connections."""
        for connection in list(self._idle):
            connection.close("not needed any more")
        self._idle.clear()

    async def fetch(self, method: Method, path: str, body: bytes = b"", header: str = "") -> bytes:
        """The whole body of a reply. `header`: more lines of a POST's head. Raises `Broken` or `Refused`."""
        connection = await self._acquire()
        try:
            reply = connection.send(self._request(method, path, body, header))
            return await self._whole(connection, reply)
        finally:
            self._release(connection)

    async def stream(self, path: str, body: bytes, header: str = "") -> AsyncGenerator[bytes, None]:
        """The body of a reply to a POST in the pieces it arrives in. Raises `Broken` or `Refused`."""
        connection = await self._acquire()
        try:
            reply = connection.send(self._request("POST", path, body, header))
            while not reply.status:
                await connection.receive()
            if reply.status != 200:
                await self._whole(connection, reply)
            while True:
                if part := reply.take():
                    yield part
                elif reply.finished:
                    return
                else:
                    await connection.receive()
        finally:
            self._release(connection)

    async def _whole(self, connection: Connection, reply: Reply) -> bytes:
        while not reply.finished:
            await connection.receive()
        content = reply.take()
        if reply.status != 200:
            raise Refused(reply.status, content)
        return content

    def _request(self, method: Method, path: str, body: bytes, header: str) -> bytes:
        start, rest = self._heads[method]
        if method == "GET":
            return f"{start}{path}{rest}".encode()
        return f"{start}{path}{rest}{len(body)}\r\n{header}\r\n".encode() + body

    async def _acquire(self) -> Connection:
        """The connection used last, or a new one."""
        if self._idle:
            connection, _ = self._idle.popitem()
            if self.clock() <= connection.idle_since + KEEP_ALIVE_S:
                return connection
            connection.close("idle for too long")
            self.close()  # the others are older
        try:
            with anyio.fail_after(CONNECT_TIMEOUT_S):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: Connection(self._idle), self._host, self._port, ssl=self._secure or None
                )
        except TimeoutError:
            raise Broken(f"no connection within {CONNECT_TIMEOUT_S:g} s") from None
        except OSError as error:
            raise Broken(str(error)) from error
        return connection

    def _release(self, connection: Connection) -> None:
        reply, connection.reply = connection.reply, None
        if connection.lost is None and reply is not None and reply.reusable:
            connection.idle_since = self.clock()
            self._idle[connection] = None
        else:
            connection.close("its reply is not wanted any more")
