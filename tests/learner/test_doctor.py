"""The doctor: what it says of a dead run, of a wrong ledger, and of nothing."""

from __future__ import annotations

import io
import json
import os
import re
import sqlite3
from pathlib import Path

import orjson
import pytest
from rich.console import Console

from learner.doctor import TAIL_BYTES, examine, run, show
from learner.hub.__main__ import write_address
from matpo.errors import UserError
from matpo.folder import RunFolder
from matpo.metrics import MetricsFile
from matpo.tool_figures import ActorFigures, ToolFigures
from tests.learner.hub.bench import bench, make_config, make_tree


def a_run(folder: Path) -> RunFolder:
    """A dead run: one tree trained on, one pending, one that failed."""
    config = make_config(learner={"groups_per_step": 1, "group_size": 2})
    (folder / "config.json").write_bytes(orjson.dumps(config.model_dump(mode="json")))
    with bench(folder, config) as at:
        at.start()
        first, second = at.ask(4)
        at.play(first)
        at.train_step(1)
        at.upload(make_tree(second, 0))
        at.upload(make_tree(second, 1, reward=None, status="tool_failure"))
    return RunFolder(folder)


def test_the_doctor_counts_what_became_of_every_tree(tmp_path: Path) -> None:
    report = examine(a_run(tmp_path), now=0.0)
    assert (report.state, report.step, report.adds_up, report.waits) == ("dead", 1, True, ())
    ledger = report.ledger
    assert (ledger.trees, ledger.trained, ledger.pending, ledger.filtered) == (4, 2, 1, 1)
    assert ledger.filtered_by == {"tool_failure": 1}
    assert report.forecast.eta == 1


def test_the_doctor_changes_nothing(tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    before = folder.journal.read_bytes()
    examine(folder, now=0.0)
    assert folder.journal.read_bytes() == before


def test_a_ledger_that_does_not_add_up_is_said_loudly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = a_run(tmp_path)
    with sqlite3.connect(folder.journal) as vandal:
        vandal.execute("UPDATE trees SET state = 'trained' WHERE state = 'pending'")
    vandal.close()
    assert run([str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert (
        "DOES NOT ADD UP" in said.out
        and "trained trees = trees reported by the steps that stand: 3 is not 2" in said.out
    )
    assert "does not add up" in said.err


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM trees WHERE state = 'pending'",
        "DELETE FROM frames WHERE tree_seq = 1",
        "UPDATE groups SET state = 'filtered' WHERE state = 'open'",
        "DELETE FROM steps",
        "DELETE FROM episodes WHERE state = 'waiting'",
        "UPDATE trees SET step = 9 WHERE step = 1",
    ],
)
def test_every_kind_of_damage_shows_in_some_sum(tmp_path: Path, damage: str) -> None:
    folder = a_run(tmp_path)
    with sqlite3.connect(folder.journal) as vandal:
        assert vandal.execute(damage).rowcount >= 1
    vandal.close()
    assert not examine(folder, now=0.0).adds_up


STATUS = {
    "stage": "hub",
    "time": 100.0,
    "waits": [
        {
            "name": "batch",
            "who": "trainer",
            "what": "a batch",
            "since_s": 50.0,
            "limit_s": 60.0,
            "remedy": "start actors",
        }
    ],
    "refused": {"malformed": 2},
}


def test_a_frozen_hub_is_named_and_the_waits_it_wrote_have_grown(tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    folder.metrics.write_bytes(orjson.dumps(STATUS) + b"\n")
    write_address(folder, "tcp://127.0.0.1:1", "ipc:///nowhere")  # of this process, which is alive
    report = examine(folder, now=130.0)
    assert [(wait.who, wait.what, wait.since_s) for wait in report.waits] == [
        ("everybody", "the hub", 30.0),
        ("trainer", "a batch", 80.0),
    ]
    assert (report.state, report.stalls, report.refused) == ("live", 2, {"malformed": 2})
    assert f"process {os.getpid()} is frozen" in report.waits[0].remedy


def test_a_dead_run_shows_what_it_waited_for_when_it_died(tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    padding = b'{"stage":"trainer","x":"' + b"x" * (2 * TAIL_BYTES) + b'"}\n'
    folder.metrics.write_bytes(padding + orjson.dumps(STATUS) + b"\n")
    assert [wait.since_s for wait in examine(folder, now=1e6).waits] == [50.0]


def test_the_report_is_one_json_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(tmp_path)
    assert run([str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ledger"]["trees"] == 4


def test_people_read_ledger_and_forecast(tmp_path: Path) -> None:
    out = io.StringIO()
    show(examine(a_run(tmp_path), now=0.0), Console(file=out, width=200))
    text = out.getvalue()
    assert "dead, step 1 of 4, no hub process" in text
    assert "1 (1 tool_failure)" in text
    assert "the ledger adds up (10 sums)" in text
    assert "forecast: freshness.eta = 1" in text


def test_the_tools_of_all_actors_are_shown_together(tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    for actor_id, calls, p99_ms in (("a", 1, 9.0), ("a", 3, 4.0), ("b", 1, 8.0)):
        used = ToolFigures(
            tool="web__search", calls=calls, recorded=0, model_errors=1, infrastructure_errors=2, result_bytes=10,
            mean_ms=float(calls), p50_ms=1.0, p99_ms=p99_ms,
        )  # fmt: skip
        MetricsFile(folder.metrics).append("actor", ActorFigures(actor_id=actor_id, tools=(used,), servers=()))
    (tool,) = examine(folder, now=0.0).tools
    assert (tool.calls, tool.model_errors, tool.infrastructure_errors) == (4, 2, 4)
    assert (tool.mean_ms, tool.p99_ms) == ((3 * 3 + 1) / 4, 8.0)
    out = io.StringIO()
    show(examine(folder, now=0.0), Console(file=out, width=200))
    assert re.search(r"web__search\W+4\W+2\W+4\W+1\.0\W+8\.0", out.getvalue())


def test_a_run_that_never_started_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.json"):
        examine(RunFolder.existing(tmp_path), now=0.0)
    (tmp_path / "config.json").write_bytes(orjson.dumps(make_config().model_dump(mode="json")))
    with pytest.raises(UserError, match=r"journal .* does not exist"):
        examine(RunFolder(tmp_path), now=0.0)
