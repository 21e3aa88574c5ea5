"""The plane over streamable HTTP: a server that goes away costs its calls, and is found again when it is back."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import anyio
import pytest
from pydantic import JsonValue

from actors.tools.plane import ToolPlane
from matpo.config import Tools
from matpo.errors import UserError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    rows = [{"id": "1", "text": "Ada was born in Lund."}, {"id": "2", "text": "x" * 300_000}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class NoMcp(BaseHTTPRequestHandler):
    """A web server that is no MCP server: answers with the status its path names, and a page."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(int(self.path.strip("/").partition("?")[0]))
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<html>hello</html>")

    def log_message(self, format: str, *args: object) -> None:
        """Quietly."""


@pytest.fixture(scope="module")
def no_mcp() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), NoMcp)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1:PORT/401?key=hunter2", "PORT/401 cannot be used: HTTP status 401 Unauthorized"),
        ("http://127.0.0.1:PORT/404", "HTTP status 404 Not Found"),
        ("http://127.0.0.1:PORT/500", "HTTP status 500 Internal Server Error"),
        ("http://127.0.0.1:PORT/200", "Unexpected content type: text/html"),
        ("127.0.0.1:PORT/mcp", "cannot be used"),
        ("http://[::1", "Invalid port"),
        ("http://no.such.host.invalid/mcp", "ConnectError"),
    ],
)
async def test_a_url_that_is_no_mcp_server_is_a_users_error(no_mcp: int, url: str, words: str) -> None:
    tools = Tools.model_validate({"mcpServers": {"web": {"url": url.replace("PORT", str(no_mcp))}}})
    with anyio.fail_after(20), pytest.raises(UserError, match="tool server 'web' at ") as caught:
        async with ToolPlane.open(tools, variables={}):
            pass
    assert words.replace("PORT", str(no_mcp)) in str(caught.value)
    assert "hunter2" not in str(caught.value)


@contextmanager
def search_server(corpus: Path, port: str = "0") -> Iterator[tuple[str, subprocess.Popen[str]]]:
    options = ["serve", "--corpus", str(corpus), "--snippet", "1000000", "--http", port]
    command = [sys.executable, "-m", "tool_servers.search", *options]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        said = process.stderr.readline()
        found = re.search(r"http://\S+", said)
        assert found is not None, said
        try:
            yield found[0], process
        finally:
            process.kill()


async def test_a_killed_http_server_fails_its_calls_and_works_again_when_it_is_back(corpus: Path) -> None:
    with search_server(corpus) as (url, process):
        extras: dict[str, JsonValue] = {"timeout_s": 5, "max_result_bytes": 1_000}
        tools = Tools.model_validate({"mcpServers": {"web": {"url": "${URL}", "type": "http", "matpo": extras}}})
        with anyio.fail_after(60):
            async with ToolPlane.open(tools, variables={**os.environ, "URL": url}) as plane:
                assert (await plane.call("web__search", {"query": "Ada"})).text == "[1] Ada was born in Lund."
                assert (await plane.call("web__search", {"query": "x" * 300_000})).outcome in ("ok", "infrastructure")
                process.kill()
                process.wait()
                outcomes: list[str] = []
                async with anyio.create_task_group() as tasks:

                    async def lost() -> None:
                        outcomes.append((await plane.call("web__search", {"query": "Ada"})).outcome)

                    for _ in range(10):
                        tasks.start_soon(lost)
                assert outcomes == ["infrastructure"] * 10
                with search_server(corpus, port=re.findall(r"\d+", url)[-1]):
                    assert (await plane.call("web__open", {"doc_id": "1"})).text == "Ada was born in Lund."
