"""Streamable HTTP for the MCP client: transport errors and oversize answers become errors of their own call."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx2
import orjson
from mcp.client.streamable_http import streamable_http_client

from actors.tools.streams import CleanedReader, Streams

TRANSPORT_FAILED = -32_099
"""JSON-RPC error code of the answer we put in place of one that never came."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an HTTP server is and what may be asked of it."""

    url: str
    headers: Mapping[str, str]
    timeout_s: float
    max_inflight: int
    max_body_bytes: int


class PerCallErrors(httpx2.AsyncBaseTransport):
    """Answers a POST that failed with a JSON-RPC error, because an exception would end the SDK's whole client."""

    def __init__(self, endpoint: Endpoint) -> None:
        most = endpoint.max_inflight + 4
        limits = httpx2.Limits(max_connections=most, max_keepalive_connections=most)
        self._inner = httpx2.AsyncHTTPTransport(limits=limits)
        self._max = endpoint.max_body_bytes

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send the request; a failed one is answered with status 200 and a JSON-RPC error for its id."""
        try:
            response = await self._inner.handle_async_request(request)
        except httpx2.TransportError as error:
            return _failure(request, f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
        if response.status_code >= 400 and not _explains_itself(request, response):
            await response.aclose()
            return _failure(request, f"HTTP status {response.status_code} {response.reason_phrase}".rstrip())
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


def _failure(request: httpx2.Request, reason: str) -> httpx2.Response:
    body = orjson.loads(request.content) if request.method == "POST" else None
    request_id = body.get("id") if isinstance(body, dict) else None
    if request_id is None:
        return httpx2.Response(503, request=request)
    error = {"jsonrpc": "2.0", "id": request_id, "error": {"code": TRANSPORT_FAILED, "message": reason}}
    return httpx2.Response(
        200, headers={"content-type": "application/json"}, content=orjson.dumps(error), request=request
    )


@asynccontextmanager
async def http_streams(endpoint: Endpoint) -> AsyncIterator[Streams]:
    """A streamable HTTP connection for the length of the block."""
    transport = PerCallErrors(endpoint)
    # The plane's deadline per call rules; this one only frees connections whose call is long over.
    timeout = httpx2.Timeout(endpoint.timeout_s + 30.0)
    async with (
        httpx2.AsyncClient(transport=transport, headers=dict(endpoint.headers), timeout=timeout) as client,
        streamable_http_client(endpoint.url, http_client=client, max_sse_event_size=endpoint.max_body_bytes) as pair,
    ):
        read, write = pair
        yield CleanedReader(read), write
