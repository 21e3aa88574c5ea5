"""Counts and latencies of calls."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.tools.figures import Latencies, ToolCount
from actors.tools.report import reported
from matpo.metrics import read_metrics
from tests.actors.tools.hosts import call, hostile


def test_quantiles_are_right_to_within_a_class() -> None:
    latencies = Latencies()
    assert latencies.quantile(0.5) == 0.0
    for milliseconds in range(1, 101):
        latencies.add(milliseconds / 1e3)
    assert latencies.quantile(0.5) == pytest.approx(0.050, rel=0.15)
    assert latencies.quantile(0.99) == pytest.approx(0.099, rel=0.15)
    assert latencies.quantile(1.0) == pytest.approx(0.100, rel=0.15)


def test_outcomes_are_counted_apart() -> None:
    count = ToolCount()
    for outcome in ("ok", "model_error", "infrastructure", "ok"):
        count.add(outcome, seconds=0.5, result_bytes=3, recorded=outcome == "ok")
    figures = count.figures("s__t")
    assert (figures.calls, figures.recorded, figures.model_errors, figures.infrastructure_errors) == (4, 2, 1, 1)
    assert (figures.result_bytes, figures.mean_ms) == (12, 500.0)


async def test_what_the_tools_did_is_in_the_metrics_of_the_run(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    async with hostile(allow=["echo"]) as plane, reported(plane, file, "actor-0", every_s=60):
        await call(plane, "echo")
    ((_, line),) = read_metrics(file)
    assert (line["stage"], line["actor_id"]) == ("actor", "actor-0")
    (tool,) = line["tools"] if isinstance(line["tools"], list) else []
    assert isinstance(tool, dict) and (tool["tool"], tool["calls"]) == ("hostile__echo", 1)
    assert line["servers"] == [{"server": "hostile", "up": 1, "copies": 1, "losses": 0}]


async def test_nothing_is_written_where_no_tool_is_called(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    async with hostile() as plane, reported(plane, file, "actor-0", every_s=60):
        pass
    assert list(read_metrics(file)) == []
