"""The MCP SDK's dispatcher with a short way for `tools/call`: one line out, one line in, a future in between."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import anyio
import anyio.abc
import mcp_types as types
import orjson
from mcp import MCPError
from mcp.shared.dispatcher import CallOptions, OnNotify, OnNotifyIntercept, OnRequest
from mcp.shared.jsonrpc_dispatcher import JSONRPCDispatcher
from mcp.shared.transport_context import TransportContext
from pydantic import JsonValue

from actors.tools.framing import Reply
from actors.tools.streams import Inbox, LineWriter

FIRST_CALL_ID = 1_000_000_000
"""Calls are numbered from here; the SDK numbers its own requests from 1."""


class CallDispatcher:
    """What a `ClientSession` runs on: everything goes the SDK's way, except calls of tools and their answers.

    On that way (streams, tracing, progress, a model per message) a call costs the client three times as much.
    """

    def __init__(self, inbox: Inbox, outbox: LineWriter) -> None:
        self._sdk: JSONRPCDispatcher[TransportContext] = JSONRPCDispatcher(inbox, outbox)
        self._outbox = outbox
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._last_id = FIRST_CALL_ID
        self._ended = False

    def answer(self, request_id: int, reply: Reply) -> bool:
        """Take the answer to one of our calls; False when it is not ours (late answers are ours, and dropped)."""
        if request_id < FIRST_CALL_ID:
            return False
        waiting = self._waiting.pop(request_id, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(reply)
        return True

    def end(self) -> None:
        """No answers will come any more: every waiting call fails now."""
        self._ended = True
        closed = types.ErrorData(code=types.CONNECTION_CLOSED, message="Connection closed")
        for request_id in list(self._waiting):
            self.answer(request_id, closed)

    async def send_raw_request(
        self, method: str, params: Mapping[str, JsonValue] | None, opts: CallOptions | None = None
    ) -> dict[str, JsonValue]:
        """Send a request and wait for its result. Raises `MCPError`; deadlines are the caller's."""
        if method != "tools/call":
            return await self._sdk.send_raw_request(method, params, opts)
        if self._ended:
            raise MCPError(code=types.CONNECTION_CLOSED, message="Connection closed")
        self._last_id += 1
        request_id = self._last_id
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = reply
        try:
            self._write({"jsonrpc": "2.0", "id": request_id, "method": method, "params": params})
            outcome = await reply
        except asyncio.CancelledError:
            if not self._ended:
                cancelled = {"requestId": request_id, "reason": "deadline"}
                self._write({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": cancelled})
            raise
        finally:
            self._waiting.pop(request_id, None)
        if isinstance(outcome, types.ErrorData):
            raise MCPError.from_error_data(outcome)
        return outcome

    async def notify(
        self, method: str, params: Mapping[str, JsonValue] | None, opts: CallOptions | None = None
    ) -> None:
        """Send a notification."""
        await self._sdk.notify(method, params, opts)

    async def run(
        self,
        on_request: OnRequest,
        on_notify: OnNotify,
        on_notify_intercept: OnNotifyIntercept | None = None,
        *,
        task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """Read until the server's output ends."""
        try:
            await self._sdk.run(on_request, on_notify, on_notify_intercept, task_status=task_status)
        finally:
            self.end()

    def _write(self, message: Mapping[str, object]) -> None:
        try:
            self._outbox.write(orjson.dumps(message))
        except anyio.BrokenResourceError:
            raise MCPError(code=types.CONNECTION_CLOSED, message="Connection closed") from None
