"""`matpo tools check` and `bench`, and an MCP file in place of a config."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from pydantic import JsonValue

from actors.tools.__main__ import main
from matpo.errors import UserError
from tests.actors.tools.hostile import TOOLS
from tests.actors.tools.hosts import entry


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tables are not broken; the command configures logging to the stderr of the moment, which is undone."""
    monkeypatch.setenv("COLUMNS", "300")
    yield
    structlog.reset_defaults()


OFF: JsonValue = {"command": "x", "disabled": True}


def mcp_file(folder: Path, **servers: JsonValue) -> str:
    file = folder / "mcp.json"
    file.write_text(json.dumps({"mcpServers": servers}))
    return str(file)


def test_check_shows_what_every_server_offers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = mcp_file(
        tmp_path,
        old=entry(allow=["echo"]),
        new=entry("--modern", bare_names=False),
        off={"command": "x", "disabled": True},
    )
    assert main(["check", file]) == 0
    rows = [line.split("│")[1:] for line in capsys.readouterr().out.splitlines() if "│" in line]
    shown = [[cell.strip() for cell in row] for row in rows]
    assert [(row[0], row[1], row[2], row[5], row[7]) for row in shown] == [
        ("old", "stdio", "2025-06-18", "1", "ok"),
        ("new", "stdio", "2026-07-28", str(len(TOOLS)), "ok"),
    ]
    pinned = mcp_file(tmp_path, old=entry(allow=["echo"], pin=shown[0][6]))
    assert main(["check", pinned]) == 0


def test_check_tells_of_every_server_that_is_wrong_and_hides_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = mcp_file(
        tmp_path,
        good=entry(),
        gone={"command": "/no/program"},
        dies=entry("--die", "no database here"),
        unset={"url": "http://127.0.0.1:9/${NOT_SET_HERE}"},
        empty=entry(allow=["*z*"]),
    )
    with pytest.raises(UserError, match=r"no program '/no/program'; install it .*\(and 3 more, see above\)"):
        main(["check", file])
    out = capsys.readouterr().out
    for words in ("ok", "no database here", "export NOT_SET_HERE", "offers no tool that may be used"):
        assert words in out


def test_bench_measures_each_level(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = mcp_file(tmp_path, hostile=entry())
    assert main(["bench", file, "hostile", "echo", '{"text": "a"}', "--seconds", "0.05"]) == 0
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [(row[0].strip(), row[2].strip()) for row in rows] == [("1", "0"), ("16", "0"), ("256", "0")]
    with pytest.raises(UserError, match="does not answer, so there is nothing to measure: Error: no such page"):
        main(["bench", file, "hostile", "tool_error", '{"text": "a"}'])


def test_an_mcp_file_takes_no_overrides(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot change an MCP file; give a config that names it"):
        main(["list", mcp_file(tmp_path), "run.steps=1"])
