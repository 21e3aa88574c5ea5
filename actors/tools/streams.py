"""The stream pair the MCP SDK reads and writes, without task hops: callbacks fill the inbox, the outbox never waits."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from types import TracebackType
from typing import Protocol, Self

import anyio
import mcp_types as types
from mcp.shared._stream_protocols import ReadStream, WriteStream
from mcp.shared.message import SessionMessage

from actors.tools.framing import cleaned

Streams = tuple[ReadStream[SessionMessage | Exception], WriteStream[SessionMessage]]
"""What an MCP transport yields."""
MAX_UNSENT_BYTES = 64 * 2**20
"""A server that leaves more than this unread is treated as gone."""


class Closing:
    """`async with` and iteration in terms of `receive` and `aclose`."""

    async def aclose(self) -> None:
        """Nothing more will come or go."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        await self.aclose()


class Inbox(Closing):
    """Messages from a server, put in by the event loop's callbacks. Bounded by the calls in flight."""

    def __init__(self) -> None:
        self._messages: deque[SessionMessage] = deque()
        self._arrived = asyncio.Event()
        self._ended = False

    def put(self, messages: Iterable[types.JSONRPCMessage]) -> None:
        """Messages arrived."""
        self._messages.extend(SessionMessage(message) for message in messages)
        self._arrived.set()

    def end(self) -> None:
        """No more will arrive."""
        self._ended = True
        self._arrived.set()

    async def receive(self) -> SessionMessage | Exception:
        """The next message. Raises `anyio.EndOfStream` after the last."""
        while not self._messages:
            if self._ended:
                raise anyio.EndOfStream
            self._arrived.clear()
            await self._arrived.wait()
        return self._messages.popleft()

    async def aclose(self) -> None:
        """The SDK is done reading."""
        self.end()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SessionMessage | Exception:
        try:
            return await self.receive()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None


class LineWriter(WriteStream[SessionMessage], Protocol):
    """Where messages to a server go."""

    def write(self, line: bytes) -> None:
        """Send one message without waiting. Raises `anyio.BrokenResourceError` when the server is gone."""
        ...


class Outbox(Closing):
    """Messages to a server. Sending never waits, so that a call's deadline counts from its start."""

    def __init__(self, pipe: asyncio.WriteTransport) -> None:
        self._pipe = pipe

    async def send(self, item: SessionMessage, /) -> None:
        """Queue one message. Raises `anyio.BrokenResourceError` when the server is gone or does not read."""
        self.write(item.message.model_dump_json(by_alias=True, exclude_unset=True).encode())

    def write(self, line: bytes) -> None:
        """Queue one line. Raises like `send`."""
        if self._pipe.is_closing() or self._pipe.get_write_buffer_size() > MAX_UNSENT_BYTES:
            raise anyio.BrokenResourceError
        self._pipe.write(line + b"\n")

    async def aclose(self) -> None:
        """The SDK is done writing; what is queued is still written, then the server sees the end of its input."""
        self._pipe.close()


class CleanedReader(Closing):
    """Another transport's read stream with its messages cleaned."""

    def __init__(self, inner: ReadStream[SessionMessage | Exception]) -> None:
        self._inner = inner

    async def receive(self) -> SessionMessage | Exception:
        """The next message of the inner stream."""
        while True:
            item = await self._inner.receive()
            if not isinstance(item, SessionMessage):
                return item
            if (message := cleaned(item.message)) is not None:
                return SessionMessage(message, item.metadata)

    async def aclose(self) -> None:
        """Close the inner stream."""
        await self._inner.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SessionMessage | Exception:
        try:
            return await self.receive()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None
