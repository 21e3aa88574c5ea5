"""Our servers through the plain MCP SDK client and through the plane, over stdio and streamable HTTP."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import mcp_types as types
import pytest
from mcp import Client, StdioServerParameters

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rows = [{"id": "1", "text": "Ada was born in Lund."}, {"id": "2", "text": "Bo was born in Oslo."}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pages") / "pages.jsonl"
    path.write_text('{"url": "http://a/", "text": "A page."}\n')
    return str(path)


def text(result: types.CallToolResult) -> str:
    (block,) = result.content
    assert isinstance(block, types.TextContent)
    return block.text


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_search_speaks_both_generations_of_the_protocol(corpus: str, mode: str) -> None:
    arguments = ["-m", "tool_servers.search", "serve", "--corpus", corpus]
    server = StdioServerParameters(command=sys.executable, args=arguments, cwd=ROOT)
    with anyio.fail_after(30):
        async with Client(server, mode=mode) as client:
            assert [tool.name for tool in (await client.list_tools()).tools] == ["search", "open"]
            found = await client.call_tool("search", {"query": "Where was Ada born?", "k": 1})
            assert (text(found), found.is_error) == ("[1] Ada was born in Lund.", False)
            wrong = await client.call_tool("search", {"query": "Ada", "k": 0})
            assert (text(wrong), wrong.is_error) == ("argument 'k' must be a whole number from 1 to 50, got 0", True)
            strange = await client.call_tool("search", {"query": "Ada", "page": 2})
            assert (text(strange), strange.is_error) == ("search has no argument 'page'", True)
            assert (await client.call_tool("close", {})).is_error


async def test_scrape_and_code_answer_any_client_over_stdio(pages: str) -> None:
    scrape = ["-m", "tool_servers.scrape", "serve", "--corpus", pages]
    code = ["-m", "tool_servers.code", "serve"]
    with anyio.fail_after(40):
        async with (
            Client(StdioServerParameters(command=sys.executable, args=scrape, cwd=ROOT)) as reader,
            Client(StdioServerParameters(command=sys.executable, args=code, cwd=ROOT)) as runner,
        ):
            assert text(await reader.call_tool("scrape", {"url": "http://a/"})) == "A page."
            done = await runner.call_tool("run_python", {"code": "6 * 7"})
            assert text(done) == "42"
            assert done.meta is not None
            assert done.meta["sandbox"] in ("bubblewrap", "landlock")


@contextmanager
def http_server(*arguments: str) -> Iterator[tuple[str, int]]:
    """A server over HTTP: its URL and process id."""
    command = [sys.executable, "-m", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        said = ""
        while (found := re.search(r"http://\S+", said)) is None:
            said = process.stderr.readline()
            assert said, "the server ended"
        try:
            yield found[0], process.pid
        finally:
            process.kill()


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_search_over_http_answers_both_generations(corpus: str, mode: str) -> None:
    with http_server("tool_servers.search", "serve", "--corpus", corpus, "--http", "0") as (url, _):
        with anyio.fail_after(30):
            async with Client(url, mode=mode) as client:
                assert text(await client.call_tool("search", {"query": "Ada", "k": 1})) == "[1] Ada was born in Lund."


def test_a_port_in_use_is_one_line_with_the_remedy(corpus: str) -> None:
    with http_server("tool_servers.search", "serve", "--corpus", corpus, "--http", "0") as (url, _):
        port = re.findall(r"\d+", url)[-1]
        again = [sys.executable, "-m", "tool_servers.search", "serve", "--corpus", corpus, "--http", port]
        done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: 127.0.0.1:{port} is in use; choose another --http PORT (0 takes any free one)\n"
