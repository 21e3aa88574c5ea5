"""A server's bytes to messages."""

from __future__ import annotations

import json

import mcp_types as types
from hypothesis import given
from hypothesis import strategies as st

from actors.tools.framing import TOO_LARGE, MessageFraming


def line(request_id: int, text: str) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": request_id, "result": {"text": text}}).encode() + b"\n"


@given(st.lists(st.text(max_size=40), min_size=1, max_size=8), st.lists(st.integers(1, 60), max_size=40))
def test_messages_do_not_depend_on_how_the_bytes_arrive(texts: list[str], sizes: list[int]) -> None:
    data = b"".join(line(number, text) for number, text in enumerate(texts))
    framing, at = MessageFraming(10_000), 0
    messages = []
    for size in [*sizes, len(data)]:
        messages += framing.feed(data[at : at + size])
        at += size
    assert [m.result["text"] for m in messages if isinstance(m, types.JSONRPCResponse)] == texts


@given(st.binary(max_size=200))
def test_no_bytes_whatsoever_break_the_next_message(junk: bytes) -> None:
    framing = MessageFraming(1_000)
    framing.feed(junk + b"\n")
    (message,) = framing.feed(line(3, "fine"))
    assert isinstance(message, types.JSONRPCResponse)
    assert message.result == {"text": "fine"}


def test_a_line_over_the_cap_becomes_an_error_of_its_own_request_wherever_the_id_stands() -> None:
    framing = MessageFraming(100)
    first = b'{"jsonrpc":"2.0","id":7,"result":{"text":"' + b"x" * 5_000
    assert framing.feed(first[:60]) == framing.feed(first[60:]) == []
    (id_first,) = framing.feed(b'"}}\n')
    (id_last,) = framing.feed(b'{"result":{"id":1,"text":"' + b"y" * 200 + b'"},"jsonrpc":"2.0","id":8}\n')
    for message, request_id in ((id_first, 7), (id_last, 8)):
        assert isinstance(message, types.JSONRPCError)
        assert (message.id, message.error.code) == (request_id, TOO_LARGE)
    assert len(framing.feed(line(9, "next"))) == 1
    assert framing.skipped == {"too large": 2}


def test_a_listing_loses_its_bad_tools_and_output_schemas_only() -> None:
    good = {"name": "good", "inputSchema": {"type": "object"}, "outputSchema": {"type": "object"}}
    listing = {"tools": [{"name": "bad", "inputSchema": {}}, good, "nonsense"], "nextCursor": "2"}
    (message,) = MessageFraming(10_000).feed(
        json.dumps({"jsonrpc": "2.0", "id": 1, "result": listing}).encode() + b"\n"
    )
    assert isinstance(message, types.JSONRPCResponse)
    assert message.result["tools"] == [{"name": "good", "inputSchema": {"type": "object"}}]
    assert message.result["_meta"] == {"matpo/dropped": ["bad", "'nonsense'"]}
    assert message.result["nextCursor"] == "2"
