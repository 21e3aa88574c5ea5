"""HTTP with server-sent events, MCP's way before streamable HTTP: answers come as events of one endless GET."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from urllib.parse import urljoin, urlsplit

import anyio
import anyio.abc
import httpx2
import mcp_types as types
import orjson
from mcp.shared.message import SessionMessage

from actors.tools.calls import CallDispatcher
from actors.tools.failures import ToolFailed
from actors.tools.framing import MessageFraming, Reply
from actors.tools.http import TRANSPORT_FAILED, Endpoint
from actors.tools.streams import Closing, Inbox

EVENTS_TIMEOUT_S = 3_600.0
"""A server that sends no event, not even a comment, for so long is connected to anew."""
MAX_CONTROL_BYTES = 8_192
"""Of a line that holds no message."""
_DATA = b"data:"


class EventFraming:
    """Cuts an event stream into MCP messages, in linear time; knows the address that requests are posted to."""

    def __init__(self, messages: MessageFraming) -> None:
        self._messages = messages
        self._line = b""
        """The line so far, as long as it may be something else than a message's data."""
        self._in_data = False
        self._event = b""
        self.address: str | None = None

    def feed(self, chunk: bytes) -> list[types.JSONRPCMessage]:
        """The messages that a chunk completes."""
        head, *rest = chunk.split(b"\n")
        found = self._more(head)
        for piece in rest:
            found += self._line_ends()
            found += self._more(piece)
        return found

    def _more(self, piece: bytes) -> list[types.JSONRPCMessage]:
        if self._in_data:
            return self._messages.feed(piece)
        self._line = (self._line + piece)[: max(MAX_CONTROL_BYTES, len(piece))]
        if self._event in (b"", b"message") and self._line.startswith(_DATA):
            self._in_data = True
            return self._messages.feed(self._line.removeprefix(_DATA))
        return []

    def _line_ends(self) -> list[types.JSONRPCMessage]:
        line, self._line = self._line.rstrip(b"\r"), b""
        if self._in_data:
            self._in_data = False
        elif not line:
            self._event = b""
            return self._messages.feed(b"\n")
        elif line.startswith(b"event:"):
            self._event = line.removeprefix(b"event:").strip()
        elif self._event == b"endpoint" and line.startswith(_DATA):
            self.address = line.removeprefix(_DATA).strip().decode("utf-8", "replace")
        return []


class _Posts(Closing):
    """Messages to a server, each in a POST of its own, so that none waits for another."""

    def __init__(
        self, client: httpx2.AsyncClient, address: str, tasks: anyio.abc.TaskGroup, failed: Callable[[int, Reply], bool]
    ) -> None:
        self._client = client
        self._address = address
        self._tasks = tasks
        self._failed = failed

    async def send(self, item: SessionMessage, /) -> None:
        """Post one message."""
        self.write(item.message.model_dump_json(by_alias=True, exclude_unset=True).encode())

    def write(self, line: bytes) -> None:
        """Post one message; a failure becomes the answer to it."""
        self._tasks.start_soon(self._post, line, name="post")

    async def _post(self, line: bytes) -> None:
        try:
            response = await self._client.post(
                self._address, content=line, headers={"content-type": "application/json"}
            )
            reason = "" if response.is_success else f"HTTP status {response.status_code} {response.reason_phrase}"
        except httpx2.TransportError as error:
            reason = f"{type(error).__name__}: {error}"
        if reason and isinstance(request_id := orjson.loads(line).get("id"), int):
            self._failed(request_id, types.ErrorData(code=TRANSPORT_FAILED, message=reason.strip()))


@asynccontextmanager
async def open_sse(endpoint: Endpoint, *, on_end: Callable[[], None]) -> AsyncIterator[CallDispatcher]:
    """A connection for the length of the block; `on_end` is called when the event stream ends.

    Raises `ToolFailed` or an httpx2 error.
    """
    inbox = Inbox()
    timeout = httpx2.Timeout(endpoint.timeout_s, read=EVENTS_TIMEOUT_S)
    limits = httpx2.Limits(max_connections=endpoint.max_inflight + 4)
    calls: CallDispatcher | None = None

    def answer(request_id: int, reply: Reply) -> bool:
        if calls is not None and calls.answer(request_id, reply):
            return True
        if isinstance(reply, types.ErrorData):
            inbox.put([types.JSONRPCError(jsonrpc="2.0", id=request_id, error=reply)])
            return True
        return False

    framing = EventFraming(MessageFraming(endpoint.max_body_bytes, answer))
    async with (
        httpx2.AsyncClient(headers=dict(endpoint.headers), timeout=timeout, limits=limits) as client,
        client.stream("GET", endpoint.url, headers={"accept": "text/event-stream"}) as response,
        anyio.create_task_group() as tasks,
    ):
        if not response.is_success:
            raise ToolFailed(f"HTTP status {response.status_code} {response.reason_phrase}".rstrip())
        chunks = response.aiter_bytes()
        address = await _address(chunks, framing, endpoint.url)
        calls = CallDispatcher(inbox, _Posts(client, address, tasks, answer))

        async def read() -> None:
            try:
                async for chunk in chunks:
                    inbox.put(framing.feed(chunk))
            except httpx2.HTTPError:
                return
            finally:
                calls.end()
                inbox.end()
                on_end()

        tasks.start_soon(read, name="events")
        yield calls
        tasks.cancel_scope.cancel()


async def _address(chunks: AsyncIterator[bytes], framing: EventFraming, url: str) -> str:
    """Where to post, as the server's first event says. Never another server: headers may hold a key."""
    async for chunk in chunks:
        framing.feed(chunk)
        if framing.address is not None:
            address = urljoin(url, framing.address)
            if urlsplit(address)[:2] != urlsplit(url)[:2]:
                raise ToolFailed(f"it wants requests to go to another server, {address}")
            return address
    raise ToolFailed("it sent no endpoint event; is it an SSE server?")
