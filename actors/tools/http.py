"""HTTP for the MCP client, streamable or the older SSE: transport errors and floods become errors of their own call."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio
import httpx2
import mcp_types as types
import orjson
from mcp.client.sse import sse_client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._stream_protocols import ReadStream
from mcp.shared.message import SessionMessage

from actors.tools.framing import clean_listing
from actors.tools.streams import CleanedReader, Inbox, Streams

TRANSPORT_FAILED = -32_099
"""JSON-RPC error code of the answer we put in place of one that never came."""

Failure = Callable[[httpx2.Request, str], httpx2.Response]
"""What stands in for the answer to a request that failed, given why it did."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an HTTP server is and what may be asked of it."""

    url: str
    headers: Mapping[str, str]
    timeout_s: float
    max_inflight: int
    max_body_bytes: int


class PerCallErrors(httpx2.AsyncBaseTransport):
    """Answers a POST that failed by a stand-in, because an exception would end the SDK's whole client."""

    def __init__(self, endpoint: Endpoint, failure: Failure, *, endless: bool = False) -> None:
        """`endless`: answers to GET are streams of events for the whole connection, whose sum has no limit."""
        most = endpoint.max_inflight + 4
        limits = httpx2.Limits(max_connections=most, max_keepalive_connections=most)
        self._inner = httpx2.AsyncHTTPTransport(limits=limits)
        self._max = endpoint.max_body_bytes
        self._failure = failure
        self._endless = endless

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send the request; a POST that failed is answered by its stand-in."""
        try:
            response = await self._inner.handle_async_request(request)
        except httpx2.TransportError as error:
            return self._failure(request, f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
        if response.status_code >= 400 and not _explains_itself(request, response):
            await response.aclose()
            return self._failure(request, f"HTTP status {response.status_code} {response.reason_phrase}".rstrip())
        if not (self._endless and request.method == "GET"):
            stream = response.stream
            assert isinstance(stream, httpx2.AsyncByteStream), "an async client streams its answers"
            response.stream = _Capped(stream, self._max)
        return response

    async def aclose(self) -> None:
        """Close the connections."""
        await self._inner.aclose()


class _Capped(httpx2.AsyncByteStream):
    """A body cut at a number of bytes; one that breaks off ends there, and parsing it fails for that call alone."""

    def __init__(self, inner: httpx2.AsyncByteStream, max_bytes: int) -> None:
        self._inner = inner
        self._left = max_bytes

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._inner:
                self._left -= len(chunk)
                if self._left < 0:
                    return
                yield chunk
        except httpx2.TransportError:
            return

    async def aclose(self) -> None:
        """Close the answer."""
        await self._inner.aclose()


def _explains_itself(request: httpx2.Request, response: httpx2.Response) -> bool:
    """Whether the SDK makes sense of an error status: a JSON-RPC body, or 404 for a session that is over."""
    if response.headers.get("content-type", "").startswith("application/json"):
        return True
    return request.method != "POST" or (response.status_code == 404 and "mcp-session-id" in request.headers)


def _request_id(request: httpx2.Request) -> int | str | None:
    body = orjson.loads(request.content) if request.method == "POST" else None
    found = body.get("id") if isinstance(body, dict) else None
    return found if isinstance(found, int | str) else None


def _as_answer(request: httpx2.Request, reason: str) -> httpx2.Response:
    """Status 200 and a JSON-RPC error for the request's id."""
    request_id = _request_id(request)
    if request_id is None:
        return httpx2.Response(503, request=request)
    error = {"jsonrpc": "2.0", "id": request_id, "error": {"code": TRANSPORT_FAILED, "message": reason}}
    return httpx2.Response(
        200, headers={"content-type": "application/json"}, content=orjson.dumps(error), request=request
    )


@asynccontextmanager
async def http_streams(endpoint: Endpoint) -> AsyncIterator[Streams]:
    """A streamable HTTP connection for the length of the block."""
    transport = PerCallErrors(endpoint, _as_answer)
    # The plane's deadline per call rules; this one only frees connections whose call is long over.
    timeout = httpx2.Timeout(endpoint.timeout_s + 30.0)
    async with (
        httpx2.AsyncClient(transport=transport, headers=dict(endpoint.headers), timeout=timeout) as client,
        streamable_http_client(endpoint.url, http_client=client, max_sse_event_size=endpoint.max_body_bytes) as pair,
    ):
        read, write = pair
        yield CleanedReader(read), write


@asynccontextmanager
async def sse_streams(endpoint: Endpoint) -> AsyncIterator[Streams]:
    """A connection of the older HTTP+SSE kind for the length of the block; it ends with the server's event stream."""
    inbox = Inbox()

    def as_message(request: httpx2.Request, reason: str) -> httpx2.Response:
        # The answer to a POST says nothing here: answers come as events, and so does this one.
        if request.method != "POST":
            return httpx2.Response(503, request=request)
        if (request_id := _request_id(request)) is not None:
            error = types.ErrorData(code=TRANSPORT_FAILED, message=reason)
            inbox.put([types.JSONRPCError(jsonrpc="2.0", id=request_id, error=error)])
        return httpx2.Response(202, request=request)

    def client(
        headers: dict[str, str] | None = None, timeout: httpx2.Timeout | None = None, auth: httpx2.Auth | None = None
    ) -> httpx2.AsyncClient:
        transport = PerCallErrors(endpoint, as_message, endless=True)
        return httpx2.AsyncClient(transport=transport, headers=headers, timeout=timeout, auth=auth)

    async def deliver(read: ReadStream[SessionMessage | Exception]) -> None:
        try:
            async for item in read:
                if isinstance(item, SessionMessage):
                    inbox.put([clean_listing(item.message)])
        finally:
            inbox.end()

    async with (
        sse_client(
            endpoint.url,
            headers=dict(endpoint.headers),
            timeout=endpoint.timeout_s + 30.0,
            sse_read_timeout=EVENTS_TIMEOUT_S,
            httpx_client_factory=client,
        ) as (read, write),
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(deliver, read, name="events")
        yield inbox, write
        tasks.cancel_scope.cancel()


EVENTS_TIMEOUT_S = 3_600.0
"""An SSE server that sends no event for so long is connected to anew."""
