"""The server's end of MCP stdio: lines in and out of pipes on the event loop, without threads or task hops.

Calls of quick tools are answered where they are read; everything else goes the SDK's way.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

import anyio
import mcp_types as types
import orjson
from mcp.shared.message import SessionMessage
from pydantic import JsonValue, ValidationError

QuickAnswer = Callable[[Mapping[str, JsonValue]], Mapping[str, JsonValue] | None]
"""The `params` of a tools/call to its result; None for what the SDK has to handle."""
MAX_LINE_BYTES = 64 * 2**20
"""A longer request is dropped; the next line is read as usual."""
HIGH_WATER = 1_000
"""Messages read but not yet handled before reading pauses."""


class LineFraming:
    """Split a byte stream into lines in linear time; a line over the cap is dropped and counted."""

    def __init__(self, max_line_bytes: int) -> None:
        self._parts: list[bytes] = []
        self._size = 0
        self._max = max_line_bytes
        self.dropped = 0

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes, without their line feeds."""
        head, *rest = data.split(b"\n")
        self._keep(head)
        lines: list[bytes] = []
        for piece in rest:
            if self._size > self._max:
                self.dropped += 1
            else:
                lines.append(b"".join(self._parts))
            self._parts, self._size = [], 0
            self._keep(piece)
        return lines

    def _keep(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > self._max:
            self._parts.clear()
        elif piece:
            self._parts.append(piece)


class PipeReader(asyncio.Protocol):
    """The read stream the SDK iterates: each complete line as one parsed message, or the error it caused."""

    def __init__(self, quick: QuickAnswer, writer: PipeWriter) -> None:
        self._quick = quick
        self._writer = writer
        self._shaken_hands = False
        self._framing = LineFraming(MAX_LINE_BYTES)
        self._messages: deque[SessionMessage | Exception] = deque()
        self._arrived = asyncio.Event()
        self._ended = False
        self._transport: asyncio.ReadTransport | None = None
        self._paused = False

    def attach(self, transport: asyncio.ReadTransport) -> None:
        """Take the opened pipe (uvloop's transports are no asyncio subclasses, so the caller's type counts)."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """asyncio: bytes came."""
        for line in self._framing.feed(data):
            if line.strip() and not self._answered(line):
                self._messages.append(_parse(line))
        if self._messages:
            self._arrived.set()
        if len(self._messages) > HIGH_WATER and self._transport is not None and not self._paused:
            self._transport.pause_reading()
            self._paused = True

    def eof_received(self) -> bool:
        """asyncio: the client closed its end."""
        self._end()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio: the pipe is gone."""
        self._end()

    async def receive(self) -> SessionMessage | Exception:
        """The next message. Raises `anyio.EndOfStream` after the last one."""
        while not self._messages:
            if self._ended:
                raise anyio.EndOfStream
            self._arrived.clear()
            await self._arrived.wait()
        if self._paused and len(self._messages) < HIGH_WATER // 2 and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return self._messages.popleft()

    async def aclose(self) -> None:
        """Stop reading."""
        self._end()
        if self._transport is not None:
            self._transport.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SessionMessage | Exception:
        try:
            return await self.receive()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        await self.aclose()

    def _answered(self, line: bytes) -> bool:
        """Whether the line was the call of a quick tool, now answered.

        Only after a handshake: newer clients send no `initialize`, but facts with each request that the SDK checks.
        """
        if self._shaken_hands is False:
            self._shaken_hands = b'"notifications/initialized"' in line
            return False
        if b'"tools/call"' not in line:
            return False
        try:
            message = orjson.loads(line)
        except orjson.JSONDecodeError:
            return False
        match message:
            case {"method": "tools/call", "id": int() | str() as request_id, "params": {"name": str()} as params}:
                result = self._quick(params)
            case _:
                return False
        return result is not None and self._writer.answer(request_id, result)

    def _end(self) -> None:
        self._ended = True
        self._arrived.set()


class PipeWriter(asyncio.BaseProtocol):
    """The write stream the SDK sends to: one line per message, with back-pressure."""

    def __init__(self) -> None:
        self._transport: asyncio.WriteTransport | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._lost = False

    def attach(self, transport: asyncio.WriteTransport) -> None:
        """Take the opened pipe."""
        self._transport = transport

    def pause_writing(self) -> None:
        """asyncio: the buffer is full."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """asyncio: the buffer drained."""
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio: the client is gone."""
        self._lost = True
        self._writable.set()

    async def send(self, item: SessionMessage, /) -> None:
        """Write one message. Raises `anyio.BrokenResourceError` when the client is gone."""
        if self._lost or self._transport is None:
            raise anyio.BrokenResourceError
        self._transport.write(item.message.model_dump_json(by_alias=True, exclude_unset=True).encode() + b"\n")
        await self._writable.wait()

    def answer(self, request_id: int | str, result: Mapping[str, JsonValue]) -> bool:
        """Write a result at once; False when the client does not keep up and the writer has to wait."""
        if self._lost or self._transport is None or not self._writable.is_set():
            return False
        self._transport.write(orjson.dumps({"jsonrpc": "2.0", "id": request_id, "result": result}) + b"\n")
        return True

    async def aclose(self) -> None:
        """Close the pipe; what was written is flushed first."""
        if self._transport is not None:
            self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        await self.aclose()


def _parse(line: bytes) -> SessionMessage | Exception:
    try:
        return SessionMessage(types.jsonrpc_message_adapter.validate_json(line, by_name=False))
    except ValidationError as error:
        return error


@asynccontextmanager
async def pipe_streams(quick: QuickAnswer) -> AsyncIterator[tuple[PipeReader, PipeWriter]]:
    """The SDK's stream pair over this process's stdin and stdout, which must be pipes or sockets.

    Meanwhile descriptor 0 is the null device and 1 is stderr, so a stray print or a child cannot break the framing.
    """
    loop = asyncio.get_running_loop()
    wire_in, wire_out = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    sys.stdout.flush()
    os.dup2(2, 1)
    write_pipe, writer = await loop.connect_write_pipe(PipeWriter, os.fdopen(wire_out, "wb", buffering=0))
    writer.attach(write_pipe)
    wire = os.fdopen(wire_in, "rb", buffering=0)
    read_pipe, reader = await loop.connect_read_pipe(lambda: PipeReader(quick, writer), wire)
    reader.attach(read_pipe)
    try:
        yield reader, writer
    finally:
        await reader.aclose()
        await writer.aclose()
