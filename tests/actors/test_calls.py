"""Both ways of writing tool calls: what is read, and what the model is told about what cannot be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue

from actors.calls import BadCall, Call, JsonCalls, Offer, XmlCalls, fault, without_thinking

JSON, XML = JsonCalls(), XmlCalls()


def xml(server: str, tool: str, arguments: str) -> str:
    return (
        f"<use_mcp_tool>\n<server_name>{server}</server_name>\n<tool_name>{tool}</tool_name>\n"
        f"<arguments>\n{arguments}\n</arguments>\n</use_mcp_tool>"
    )


def offer(properties: dict[str, JsonValue], required: list[str]) -> Offer:
    schema: dict[str, JsonValue] = {"type": "object", "properties": properties, "required": [*required]}
    return Offer("search", "web", "search", "Finds.", schema)


SEARCH = offer({"query": {"type": "string"}, "count": {"type": "integer"}}, ["query"])


def test_several_json_calls_of_one_message_are_read_in_order_with_their_arguments() -> None:
    text = (
        'First.\n<tool_call>\n{"name": "a", "arguments": {"x": 1}}\n</tool_call> then '
        '<tool_call>{"name": "b", "arguments": {"y": {"z": ["q"]}}}</tool_call>'
    )
    assert JSON.parse(text) == (Call("a", None, {"x": 1}), Call("b", None, {"y": {"z": ["q"]}}))


def test_an_xml_call_names_its_server() -> None:
    text = "Plan.\n" + xml("web", "search", '{"query": "x"}')
    assert XML.parse(text) == (Call("search", "web", {"query": "x"}),)


def test_a_message_without_blocks_has_no_calls() -> None:
    assert JSON.parse("The answer is 4 < 5.") == () and XML.parse("<b>bold</b>") == ()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('<tool_call>{"name": "a"}', "not closed"),
        ('{"name": "a"}</tool_call>', "without <tool_call> before it"),
        ('<tool_call>{"name": "a"</tool_call>', "not valid JSON"),
        ("<tool_call>[1]</tool_call>", 'a JSON object with "name"'),
        ('<tool_call>{"tool": "a"}</tool_call>', 'a JSON object with "name"'),
        ('<tool_call>{"name": "a", "arguments": "{}"}</tool_call>', "must be a JSON object, not a string"),
    ],
)
def test_a_bad_json_block_says_what_to_fix(text: str, reason: str) -> None:
    (block,) = JSON.parse(text)
    assert isinstance(block, BadCall) and reason in block.reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<use_mcp_tool><server_name>s</server_name>", "not closed"),
        ("<use_mcp_tool><server_name>s</server_name></use_mcp_tool>", "no <tool_name>"),
        (xml("s", "t", "{"), "<arguments> is not valid JSON"),
        (xml("s", "t", "[]"), "must hold one JSON object"),
    ],
)
def test_a_bad_xml_block_says_what_to_fix(text: str, reason: str) -> None:
    (block,) = XML.parse(text)
    assert isinstance(block, BadCall) and reason in block.reason


def test_a_block_opened_again_before_it_was_closed_is_one_bad_call_and_one_good_one() -> None:
    first, second = JSON.parse('<tool_call>{"na <tool_call>{"name": "a", "arguments": {}}</tool_call>')
    assert isinstance(first, BadCall) and second == Call("a", None, {})


def test_calls_inside_thinking_are_not_run() -> None:
    call = '<tool_call>{"name": "a", "arguments": {}}</tool_call>'
    assert JSON.parse(f"<think>maybe {call}</think>Done.") == ()
    assert JSON.parse(f"<think>maybe {call}") == ()
    assert JSON.parse(f"thought</think>{call}") == (Call("a", None, {}),)


def test_thinking_is_cut_up_to_its_last_end_and_from_an_open_beginning() -> None:
    assert without_thinking("a</think>b</think>c") == "c"
    assert without_thinking("<think>a</think>b<think>c") == "b"
    assert without_thinking("plain") == "plain"


def test_stripping_removes_thinking_and_blocks_closed_or_not() -> None:
    call = '<tool_call>{"name": "a", "arguments": {}}</tool_call>'
    assert JSON.strip(f"<think>x</think> One {call} two {call}") == "One  two"
    assert JSON.strip(f"One {call} two <tool_call>" + '{"name') == "One  two"
    assert XML.strip(f"One {xml('s', 't', '{}')}") == "One"


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (Call("find", None, {}), "you have no tool 'find'; you may call search"),
        (Call("search", "net", {"query": "x"}), "tool 'search' is on the server 'web', not 'net'"),
        (Call("search", None, {"count": 1}), "tool 'search' needs the argument 'query'; it takes count, query"),
        (
            Call("search", None, {"query": "x", "site": 1}),
            "tool 'search' has no argument 'site'; it takes count, query",
        ),
        (Call("search", None, {"query": 3}), "argument 'query' of tool 'search' must be of type string, not 3"),
        (Call("search", None, {"query": "x", "count": True}), "must be of type integer, not true"),
    ],
)
def test_a_call_that_does_not_fit_the_schema_says_why(call: Call, reason: str) -> None:
    assert reason in (fault(call, {"search": SEARCH}) or "")


def test_a_call_that_fits_has_no_fault() -> None:
    assert fault(Call("search", "web", {"query": "x", "count": 3}), {"search": SEARCH}) is None
    assert fault(Call("a", None, {}), {}) == "you have no tool 'a'; you have no tools; answer directly"


def test_the_tool_list_is_the_same_text_every_time_and_names_every_tool() -> None:
    for form in (JSON, XML):
        text = form.describe([SEARCH])
        assert text == form.describe([SEARCH]) and "search" in text and '"query"' in text
        assert form.describe([]) == ""


@given(st.text())
def test_no_text_breaks_the_readers(text: str) -> None:
    for form in (JSON, XML):
        form.parse(text)
        form.strip(text)


@given(
    st.lists(
        st.sampled_from(["<tool_call>", "</tool_call>", '{"name": "a", "arguments": {}}', "x", "<think>", "</think>"])
    )
)
def test_whatever_the_order_of_tags_what_is_left_holds_none(parts: list[str]) -> None:
    left = JSON.strip("".join(parts))
    assert "<tool_call>" not in left and "</tool_call>" not in left
