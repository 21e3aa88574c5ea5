"""The plane over streamable HTTP: a server that goes away costs its calls, and is found again when it is back."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest
from pydantic import JsonValue

from actors.tools.plane import ToolPlane
from matpo.config import Tools

ROOT = Path(__file__).parents[3]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    rows = [{"id": "1", "text": "Ada was born in Lund."}, {"id": "2", "text": "x" * 300_000}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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
                assert (await plane.call("search", {"query": "Ada"})).text == "[1] Ada was born in Lund."
                assert (await plane.call("search", {"query": "x" * 300_000})).outcome in ("ok", "infrastructure")
                process.kill()
                process.wait()
                outcomes: list[str] = []
                async with anyio.create_task_group() as tasks:

                    async def lost() -> None:
                        outcomes.append((await plane.call("search", {"query": "Ada"})).outcome)

                    for _ in range(10):
                        tasks.start_soon(lost)
                assert outcomes == ["infrastructure"] * 10
                with search_server(corpus, port=re.findall(r"\d+", url)[-1]):
                    assert (await plane.call("search", {"query": "Ada"})).text == "[1] Ada was born in Lund."
