"""What all our servers share: framing of requests, and answers of quick tools without the SDK's way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue

from tool_servers.serving import Arguments, Reply, ServedTool, Service, quick_result, text_argument
from tool_servers.stdio import LineFraming

ROOT = Path(__file__).parents[2]


@given(st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")), max_size=8), st.integers(1, 20))
def test_lines_do_not_depend_on_how_the_bytes_arrive_and_long_ones_are_dropped(lines: list[bytes], step: int) -> None:
    data = b"".join(line + b"\n" for line in lines)
    framing = LineFraming(20)
    read = [line for at in range(0, len(data), step) for line in framing.feed(data[at : at + step])]
    assert read == [line for line in lines if len(line) <= 20]
    assert framing.dropped == len(lines) - len(read)


def service(*, quick: bool) -> Service:
    def shout(arguments: Arguments) -> Reply:
        return Reply(text_argument(arguments, "text").upper(), meta={"loud": True})

    properties: dict[str, JsonValue] = {"text": {"type": "string"}}
    return Service("s", "", (ServedTool("shout", "", {"properties": properties}, shout, quick=quick),))


def test_a_quick_tool_is_answered_and_anything_else_left_to_the_sdk() -> None:
    assert quick_result(service(quick=True), {"name": "shout", "arguments": {"text": "hi"}}) == {
        "content": [{"type": "text", "text": "HI"}],
        "isError": False,
        "_meta": {"loud": True},
    }
    wrong = quick_result(service(quick=True), {"name": "shout"})
    assert wrong is not None
    assert wrong["isError"] is True
    assert quick_result(service(quick=False), {"name": "shout", "arguments": {"text": "hi"}}) is None
    assert quick_result(service(quick=True), {"name": "shout", "arguments": [1]}) is None


def test_a_server_answers_after_nonsense_and_ends_with_its_input(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": "1", "text": "Ada was born in Lund."}\n')
    client = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
    call = {"name": "search", "arguments": {"query": "Ada"}}
    sent = [
        json.dumps({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": client}),
        json.dumps({"jsonrpc": "2.0", "method": "notifications/initialized"}),
        "nonsense",
        '{"method": "tools/call", "id": 5}',
        '{"method": "tools/call"',
        "\udcff",
        json.dumps({"jsonrpc": "2.0", "id": "seven", "method": "tools/call", "params": call}),
        json.dumps({"jsonrpc": "2.0", "id": 8, "method": "tools/call", "params": {"name": "search", "arguments": [1]}}),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tool_servers.search", "serve", "--corpus", str(corpus)],
        cwd=ROOT,
        input="\n".join(sent).encode("utf-8", "surrogateescape") + b"\n",
        capture_output=True,
        timeout=30,
        check=False,
    )
    answers = {answer.get("id"): answer for answer in map(json.loads, done.stdout.splitlines())}
    assert answers[1]["result"]["serverInfo"] == {"name": "search", "version": "0.1.0"}
    assert answers["seven"]["result"]["content"] == [{"type": "text", "text": "[1] Ada was born in Lund."}]
    assert "error" in answers[8]
    assert done.returncode == 0
