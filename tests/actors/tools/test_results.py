"""Tool results as text."""

from __future__ import annotations

import mcp_types as types
from pydantic import JsonValue

from actors.tools.results import cut, readable


def test_text_is_kept_and_everything_else_described() -> None:
    result = types.CallToolResult(
        content=[
            types.TextContent(text="Found:"),
            types.ImageContent(data="MTIzNDU=", mime_type="image/png"),
            types.AudioContent(data="AAAA", mime_type="audio/wav"),
            types.ResourceLink(name="log", uri="file:///log", mime_type="text/plain"),
            types.EmbeddedResource(resource=types.TextResourceContents(uri="file:///a", text="inside")),
            types.EmbeddedResource(resource=types.BlobResourceContents(uri="file:///b", blob="AAA=")),
        ]
    )
    assert readable(result).splitlines() == [
        "Found:",
        "[image: image/png, 5 bytes]",
        "[audio: audio/wav, 3 bytes]",
        "[resource: log, file:///log, text/plain]",
        "inside",
        "[resource: file:///b, binary, 2 bytes]",
    ]


def test_structured_content_stands_in_for_missing_text() -> None:
    assert readable(types.CallToolResult(content=[], structured_content={"a": 1})) == '{\n  "a": 1\n}'
    assert readable(types.CallToolResult(content=[])) == "(no output)"
    deep: JsonValue = 1
    for _ in range(300):
        deep = [deep]
    nested = types.CallToolResult(content=[], structured_content={"a": deep})
    assert readable(nested) == "[structured content, nested too deeply to be shown]"


def test_long_text_is_cut_at_a_character_and_says_so() -> None:
    assert cut("ééé", 6) == "ééé"
    assert cut("ééé", 5) == "éé\n[cut: 6 bytes, 5 shown]"
