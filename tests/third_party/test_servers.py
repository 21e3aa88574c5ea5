"""MCP servers of other people work by config alone, in old and new versions, over every transport they offer."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import anyio
import pytest
from pydantic import JsonValue

from actors.tools.plane import ToolPlane
from actors.tools.server import ToolServer
from matpo.config import McpServer, Tools

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = ROOT / ".cache" / "third-party"
NODE = ROOT / ".cache" / "conformance" / "node" / "bin" / "node"
VARIABLES = {"THIRD": str(INSTALLED), "NODE": str(NODE)}
# What a user has in .mcp.json, but for the places.
SERVERS: dict[str, JsonValue] = {
    "time": {"command": "${THIRD}/time/bin/mcp-server-time", "args": ["--local-timezone", "UTC"]},
    "time_old": {"command": "${THIRD}/time_old/bin/mcp-server-time", "args": ["--local-timezone", "UTC"]},
    "git": {"command": "${THIRD}/git/bin/mcp-server-git", "args": ["--repository", "${DIR}/repo"]},
    "fetch": {
        "command": "${THIRD}/fetch/bin/mcp-server-fetch",
        "args": ["--ignore-robots-txt", "--allow-private-ips"],
    },
    "sqlite": {"command": "${THIRD}/sqlite/bin/mcp-server-sqlite", "args": ["--db-path", "${DIR}/some.db"]},
    "everything": {"command": "${NODE}", "args": ["${THIRD}/npm/node_modules/${AT}/server-everything/dist/index.js"]},
    "filesystem": {
        "command": "${NODE}",
        "args": ["${THIRD}/npm/node_modules/${AT}/server-filesystem/dist/index.js", "${DIR}/files"],
    },
    "memory": {
        "command": "${NODE}",
        "args": ["${THIRD}/npm/node_modules/${AT}/server-memory/dist/index.js"],
        "env": {"MEMORY_FILE_PATH": "${DIR}/memory.jsonl"},
    },
}
pytestmark = [pytest.mark.thirdparty, pytest.mark.timeout(180)]


@dataclass(frozen=True, slots=True)
class Try:
    """A call, and words that its result holds."""

    tool: str
    arguments: dict[str, JsonValue]
    words: str


ENTITY: JsonValue = [{"name": "Ada", "entityType": "person", "observations": ["born in Lund"]}]
NOON: dict[str, JsonValue] = {"source_timezone": "UTC", "time": "12:00", "target_timezone": "Asia/Tokyo"}
TRIES = {
    "time": [Try("convert_time", NOON, "21:00")],
    "time_old": [Try("convert_time", NOON, "21:00")],
    "git": [
        Try("git_log", {"repo_path": "${DIR}/repo"}, "first words"),
        Try("git_branch", {"repo_path": "${DIR}/repo", "branch_type": "local"}, "trunk"),
    ],
    "fetch": [Try("fetch", {"url": "${PAGE}"}, "Ada was born in Lund.")],
    "sqlite": [
        Try("create_table", {"query": "CREATE TABLE born (name TEXT, year INTEGER)"}, "created successfully"),
        Try("write_query", {"query": "INSERT INTO born VALUES ('Ada', 1815)"}, "affected_rows"),
        Try("read_query", {"query": "SELECT year FROM born WHERE name = 'Ada'"}, "1815"),
    ],
    "everything": [
        Try("echo", {"message": "grüß"}, "grüß"),
        Try("get-sum", {"a": 2, "b": 40}, "42"),
        Try("get-tiny-image", {}, "[image: image/png, "),
        Try("get-structured-content", {"location": "Chicago"}, "temperature"),
        Try("get-resource-links", {"count": 1}, "[resource: "),
        Try("get-resource-reference", {"resourceType": "Blob", "resourceId": 1}, "bytes]"),
        Try("trigger-long-running-operation", {"duration": 0.2, "steps": 2}, "completed"),
    ],
    "filesystem": [
        Try("write_file", {"path": "${DIR}/files/a.txt", "content": "hello"}, "Successfully wrote"),
        Try("read_text_file", {"path": "${DIR}/files/a.txt"}, "hello"),
        Try("list_directory", {"path": "${DIR}/files"}, "[FILE] a.txt"),
    ],
    "memory": [
        Try("create_entities", {"entities": ENTITY}, "Ada"),
        Try("search_nodes", {"query": "Lund"}, "born in Lund"),
    ],
}
REFUSED = {
    "git": Try("git_log", {"repo_path": "/nowhere"}, "nowhere"),
    "filesystem": Try("read_text_file", {"path": "/etc/passwd"}, "Access denied"),
    "time": Try("convert_time", {**NOON, "target_timezone": "Nowhere/At_All"}, "Nowhere/At_All"),
}


class Page(BaseHTTPRequestHandler):
    """One small web page."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<html><body><article><p>Ada was born in Lund.</p></article></body></html>")

    def log_message(self, format: str, *args: object) -> None:
        """Quietly."""


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The places, a repository and a web page."""
    if not (INSTALLED / ".ready").is_file():
        pytest.fail(f"{INSTALLED} is not installed; run `make third-party`")
    folder = tmp_path_factory.mktemp("third")
    (folder / "files").mkdir()
    repository = str(folder / "repo")
    author = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "init", "--quiet", "--initial-branch=trunk", repository], check=True)
    commit = ["git", "-C", repository, *author, "commit", "--quiet", "--allow-empty", "-m", "first words"]
    subprocess.run(commit, check=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    page = f"http://127.0.0.1:{server.server_port}/page"
    yield VARIABLES | {"DIR": str(folder), "PAGE": page, "AT": "@modelcontextprotocol"}
    server.shutdown()
    thread.join()
    server.server_close()


def filled(arguments: dict[str, JsonValue], variables: dict[str, str]) -> dict[str, JsonValue]:
    text = json.dumps(arguments)
    for name, value in variables.items():
        text = text.replace(f"${{{name}}}", value)
    content: dict[str, JsonValue] = json.loads(text)
    return content


async def use(plane: ToolPlane, server: str, variables: dict[str, str]) -> None:
    """Make every call of a server's table."""
    for attempt in TRIES[server]:
        arguments = filled(attempt.arguments, variables)
        result = await plane.call(plane.name_of(server, attempt.tool), arguments)
        assert (result.outcome, attempt.words in result.text) == ("ok", True), (attempt, result)
    if (wrong := REFUSED.get(server)) is not None:
        result = await plane.call(plane.name_of(server, wrong.tool), filled(wrong.arguments, variables))
        assert (result.outcome, wrong.words in result.text) == ("model_error", True), result


@pytest.mark.parametrize("server", SERVERS)
async def test_a_server_works_over_stdio(server: str, variables: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / ".mcp.json"
    file.write_text(json.dumps({"mcpServers": {server: SERVERS[server]}}))
    with anyio.fail_after(120):
        async with ToolPlane.open(Tools(file=file), variables=variables) as plane:
            await use(plane, server, variables)


@pytest.mark.parametrize(
    ("server", "handshake", "protocol"),
    [("time", True, "2025-11-25"), ("time", False, "2026-07-28"), ("time_old", True, "2025-11-25")],
)
async def test_old_and_new_protocols_are_agreed_on(
    server: str, handshake: bool, protocol: str, variables: dict[str, str]
) -> None:
    entry = McpServer.model_validate(filled({"entry": SERVERS[server]}, variables)["entry"])
    reached = ToolServer(server, entry, handshake=handshake)
    with anyio.fail_after(120):
        async with anyio.create_task_group() as owner:
            owner.start_soon(reached.run)
            await reached.ready()
            result = await reached.call("convert_time", NOON)
            reached.stop()
    assert reached.facts is not None and reached.facts.protocol == protocol
    assert not result.is_error


@contextmanager
def everything(kind: str) -> Iterator[str]:
    """The URL of server-everything over HTTP."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = INSTALLED / "npm/node_modules/@modelcontextprotocol/server-everything/dist/index.js"
    environment = os.environ | {"PORT": str(port)}
    with subprocess.Popen(
        [str(NODE), str(script), kind], env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stderr is not None
        try:
            while f"{port}" not in process.stderr.readline():
                assert process.poll() is None, "the server ended"
            yield f"http://127.0.0.1:{port}/{'sse' if kind == 'sse' else 'mcp'}"
        finally:
            process.kill()


@pytest.mark.parametrize("kind", ["streamableHttp", "sse"])
async def test_a_server_works_over_http(kind: str, variables: dict[str, str]) -> None:
    with everything(kind) as url:
        entry: JsonValue = {"type": kind, "url": url}
        tools = Tools.model_validate({"mcpServers": {"everything": entry}})
        with anyio.fail_after(60):
            async with ToolPlane.open(tools, variables=variables) as plane:
                await use(plane, "everything", variables)
