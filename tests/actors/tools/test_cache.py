"""Recorded calls: the same answer again, made once, without the server if need be."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import anyio
import pytest

from actors.tools.plane import ToolPlane, ToolResult
from matpo.config import Tools
from matpo.errors import UserError
from tests.actors.tools.hosts import call, hostile


def rows(file: Path) -> list[tuple[str, str, str]]:
    with closing(sqlite3.connect(file)) as database:
        return list(database.execute("SELECT tool, arguments, corpus FROM calls ORDER BY tool, arguments"))


async def test_a_recorded_run_replays_without_its_server(tmp_path: Path) -> None:
    file = tmp_path / "calls.sqlite"
    async with hostile(cache_file=file, cache="record") as plane:
        first = await call(plane, "pid")
        assert (await call(plane, "pid")).text == first.text
        assert (await call(plane, "echo", "grüß")).text == "grüß"
        specs = plane.specs(["*"])
        (counted,) = [figures for figures in plane.figures("a").tools if figures.tool == "hostile__pid"]
        assert (counted.calls, counted.recorded) == (2, 1)
    gone = {"command": "/no/such/program", "matpo": {"cache": "replay", "bare_names": True}}
    tools = Tools.model_validate({"mcpServers": {"hostile": gone}, "cache_file": file})
    async with ToolPlane.open(tools, variables={}) as plane:
        assert plane.specs(["*"]) == specs
        assert (await call(plane, "pid")).text == first.text
        assert (await call(plane, "echo", "grüß")).text == "grüß"
        missed = await call(plane, "echo", "new")
        assert missed.outcome == "infrastructure"
        assert "was not recorded, and server 'hostile' is only replayed" in missed.text
        assert (await plane.call("echo", {})).outcome == "model_error"


async def test_errors_are_never_recorded(tmp_path: Path) -> None:
    file = tmp_path / "calls.sqlite"
    async with hostile(cache_file=file, cache="record", timeout_s=0.3) as plane:
        for tool in ("tool_error", "refuse", "hang", "crash", "lie"):
            assert (await call(plane, tool)).outcome != "ok"
        assert (await call(plane, "echo")).outcome == "ok"
    assert rows(file) == [("echo", '{"text":"hello"}', "")]


async def test_arguments_are_the_same_in_any_order_and_a_new_corpus_is_another_call(tmp_path: Path) -> None:
    file = tmp_path / "calls.sqlite"
    for corpus in ("wiki-18", "wiki-19"):
        async with hostile("--corpus", corpus, cache_file=file, cache="record") as plane:
            await plane.call("pid", {"text": "a", "more": 1})
            await plane.call("pid", {"more": 1, "text": "a"})
    assert rows(file) == [("pid", '{"more":1,"text":"a"}', corpus) for corpus in ("wiki-18", "wiki-19")]


async def test_siblings_that_ask_the_same_at_a_time_make_one_call(tmp_path: Path) -> None:
    async with hostile(cache_file=tmp_path / "calls.sqlite", cache="record") as plane:
        peaks: list[ToolResult] = []
        async with anyio.create_task_group() as tasks:

            async def sibling() -> None:
                peaks.append(await call(plane, "peak"))

            for _ in range(8):
                tasks.start_soon(sibling)
        assert [result.text for result in peaks] == ["1"] * 8
        assert (await call(plane, "peak", "other")).text == "1"


async def test_a_sibling_whose_caller_leaves_is_replaced_by_the_next(tmp_path: Path) -> None:
    async with hostile(cache_file=tmp_path / "calls.sqlite", cache="record") as plane:
        results: list[ToolResult] = []

        async def sibling() -> None:
            results.append(await call(plane, "slow", "0.2"))

        async with anyio.create_task_group() as staying, anyio.create_task_group() as leaving:
            leaving.start_soon(sibling)
            await anyio.wait_all_tasks_blocked()
            staying.start_soon(sibling)
            await anyio.wait_all_tasks_blocked()
            leaving.cancel_scope.cancel()
        assert [result.outcome for result in results] == ["ok"]


async def test_replaying_what_was_never_recorded_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing of tool server 'hostile' is recorded .* matpo.cache = \"record\""):
        async with hostile(cache_file=tmp_path / "calls.sqlite", cache="replay"):
            pass


async def test_a_file_that_is_no_database_is_a_users_error(tmp_path: Path) -> None:
    file = tmp_path / "calls.sqlite"
    file.write_text("not a database, but long enough to look like one " * 40)
    with pytest.raises(UserError, match=r"tools.cache_file '.*calls.sqlite' cannot be used \(file is not a database\)"):
        async with hostile(cache_file=file, cache="record"):
            pass
