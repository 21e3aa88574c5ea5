"""Any result of an MCP tool as text a model can read: text as it is, everything else described, never dumped."""

from __future__ import annotations

from collections.abc import Sequence

import mcp_types as types
import orjson


def readable(result: types.CallToolResult) -> str:
    """The result's text; images, audio and binaries as one descriptive line each; else its structured content."""
    parts = [_part(block) for block in result.content]
    if not parts and result.structured_content is not None:
        try:
            return orjson.dumps(result.structured_content, option=orjson.OPT_INDENT_2).decode()
        except orjson.JSONEncodeError:
            return "[structured content, nested too deeply to be shown]"
    return "\n".join(parts) or "(no output)"


def cut(text: str, max_bytes: int) -> str:
    """At most `max_bytes` of UTF-8, with a note of what was left out."""
    # Four bytes a character is the most UTF-8 needs, so short texts need no encoding to be measured.
    if len(text) * 4 <= max_bytes:
        return text
    encoded = text.encode()
    if len(encoded) <= max_bytes:
        return text
    return f"{encoded[:max_bytes].decode(errors='ignore')}\n[cut: {len(encoded):,} bytes, {max_bytes:,} shown]"


def _part(block: types.ContentBlock) -> str:
    match block:
        case types.TextContent(text=text):
            return text
        case types.ImageContent(data=data, mime_type=kind):
            return f"[image: {kind}, {_decoded_bytes(data):,} bytes]"
        case types.AudioContent(data=data, mime_type=kind):
            return f"[audio: {kind}, {_decoded_bytes(data):,} bytes]"
        case types.ResourceLink():
            facts: Sequence[str | None] = (block.title or block.name, str(block.uri), block.mime_type)
            return f"[resource: {', '.join(fact for fact in facts if fact)}]"
        case types.EmbeddedResource(resource=resource):
            return _resource(resource)


def _resource(resource: types.TextResourceContents | types.BlobResourceContents) -> str:
    if isinstance(resource, types.TextResourceContents):
        return resource.text
    return f"[resource: {resource.uri}, {resource.mime_type or 'binary'}, {_decoded_bytes(resource.blob):,} bytes]"


def _decoded_bytes(base64: str) -> int:
    return len(base64) * 3 // 4 - base64[-2:].count("=")
