"""Bytes of a tool server to MCP messages, in linear time; whatever is no message is skipped and counted."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable

import mcp_types as types
import orjson
from pydantic import JsonValue, ValidationError

_HEAD_BYTES = 4_096
_TAIL_BYTES = 128
# Servers write the id before the result or, like the TypeScript SDK, after it.
_ID_AT_START = re.compile(rb'^\s*\{(?:\s*"jsonrpc"\s*:\s*"2\.0"\s*,)?\s*"id"\s*:\s*(\d+)')
_ID_AT_END = re.compile(rb'"id"\s*:\s*(\d+)\s*(?:,\s*"jsonrpc"\s*:\s*"2\.0"\s*)?\}\s*$')
TOO_LARGE = -32_098
"""JSON-RPC error code of the answer we put in place of one over the cap."""


Reply = dict[str, JsonValue] | types.ErrorData
"""The result of a request, or why there is none."""
Answer = Callable[[int, Reply], bool]
"""Offered every answer with a numeric id; true when it took it, so that it is no message for the SDK."""


class MessageFraming:
    """Cuts a server's stdout into messages. Junk lines, invalid UTF-8 and oversize lines cost only themselves."""

    def __init__(self, max_line_bytes: int, answer: Answer | None = None) -> None:
        self._answer = answer
        self._max = max_line_bytes
        self._parts: list[bytes] = []
        self._size = 0
        self._tail = b""
        self.skipped: Counter[str] = Counter()
        """Lines that were no message, by reason."""

    def feed(self, data: bytes) -> list[types.JSONRPCMessage]:
        """The messages that `data` completes."""
        head, *rest = data.split(b"\n")
        self._keep(head)
        messages: list[types.JSONRPCMessage] = []
        for piece in rest:
            message = self._oversize() if self._size > self._max else self._parse(b"".join(self._parts))
            if message is not None:
                messages.append(message)
            self._parts, self._size = [], 0
            self._keep(piece)
        return messages

    def _keep(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size <= self._max:
            self._parts.append(piece)
        else:
            # Only the ends are kept, to learn which request the answer belongs to.
            if len(self._parts) != 1 or len(self._parts[0]) > _HEAD_BYTES:
                self._parts = [b"".join([*self._parts, piece])[:_HEAD_BYTES]]
            self._tail = (self._tail + piece[-_TAIL_BYTES:])[-_TAIL_BYTES:]

    def _parse(self, line: bytes) -> types.JSONRPCMessage | None:
        line = line.strip()
        if not line.startswith(b"{"):
            if line:
                self.skipped["not JSON"] += 1
            return None
        try:
            content = orjson.loads(line)
        except orjson.JSONDecodeError:
            content = self._repaired(line)
        if not isinstance(content, dict):
            return None
        if self._answered(content):
            return None
        try:
            return cleaned(types.jsonrpc_message_adapter.validate_python(content, by_name=False))
        except ValidationError:
            self.skipped["not a message"] += 1
            return None

    def _repaired(self, line: bytes) -> JsonValue:
        """A line that is JSON but for its UTF-8; None, counted, for any other."""
        text = line.decode("utf-8", "replace")
        try:
            content: JsonValue = json.loads(text)
        except (ValueError, RecursionError):
            self.skipped["not JSON"] += 1
            return None
        self.skipped["invalid UTF-8"] += 1
        return content

    def _answered(self, content: dict[str, JsonValue]) -> bool:
        """Whether it was an answer that a waiting call took."""
        request_id, result = content.get("id"), content.get("result")
        if self._answer is None or not isinstance(request_id, int) or "method" in content:
            return False
        if isinstance(result, dict):
            return self._answer(request_id, result)
        try:
            error = types.ErrorData.model_validate(content.get("error"))
        except ValidationError:
            error = types.ErrorData(code=types.INTERNAL_ERROR, message="the answer has neither a result nor an error")
        return self._answer(request_id, error)

    def _oversize(self) -> types.JSONRPCMessage | None:
        self.skipped["too large"] += 1
        found = _ID_AT_START.search(self._parts[0]) or _ID_AT_END.search(self._tail)
        self._tail = b""
        if found is None:
            return None
        error = types.ErrorData(code=TOO_LARGE, message=f"the answer was larger than {self._max:,} bytes")
        if self._answer is not None and self._answer(int(found[1]), error):
            return None
        return types.JSONRPCError(jsonrpc="2.0", id=int(found[1]), error=error)


def cleaned(message: types.JSONRPCMessage) -> types.JSONRPCMessage | None:
    """A message without what the SDK stumbles over or logs at length: of notifications only that tools changed is left.

    An answer to tools/list loses those that are no valid MCP tools (the plane says which), and all output schemas: the
    text is what the model reads, and a server that breaks its own output schema must not fail the call.
    """
    if isinstance(message, types.JSONRPCNotification):
        return types.JSONRPCNotification(jsonrpc="2.0", method=NEW_TOOLS) if message.method == NEW_TOOLS else None
    if not isinstance(message, types.JSONRPCResponse) or not isinstance(tools := message.result.get("tools"), list):
        return message
    kept = []
    for tool in tools:
        try:
            types.Tool.model_validate(tool, by_name=False)
        except ValidationError:
            continue
        schema = tool["inputSchema"]
        if isinstance(schema, dict) and schema.get("type") == "object" and _is_shallow(schema):
            kept.append({key: value for key, value in tool.items() if key != "outputSchema"})
    names = [str(tool.get("name")) if isinstance(tool, dict) else repr(tool) for tool in tools]
    good = {str(tool["name"]) for tool in kept}
    dropped = [name[:80] for name in names if name not in good]
    meta = message.result.get("_meta")
    noted = {**(meta if isinstance(meta, dict) else {}), DROPPED: dropped}
    return message.model_copy(update={"result": {**message.result, "tools": kept, "_meta": noted}})


def _is_shallow(value: JsonValue) -> bool:
    """Whether lists and objects stand at most `MAX_DEPTH` inside one another: the SDK gives up on deep ones."""
    level: list[JsonValue] = [value]
    for _ in range(MAX_DEPTH):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [element for group in inner for element in group]
        if not level:
            return True
    return False


MAX_DEPTH = 64
"""Of a tool's schema."""
NEW_TOOLS = "notifications/tools/list_changed"
DROPPED = "matpo/dropped"
"""Key in a listing's `_meta`: names of the tools that `cleaned` left out."""
