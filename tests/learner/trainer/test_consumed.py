"""The trainer's own record of what it trained on: complete, true after every crash, enough to catch a wrong ledger."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import orjson
import pytest

from learner.trainer.consumed import ConsumedLog
from tests.chaos.consumption import judge, read_consumption
from tests.learner.trainer.runs import make_run, run_trainer


def test_each_step_is_recorded_with_its_trees_before_the_hub_hears_of_it(tmp_path: Path) -> None:
    folder, config = make_run(tmp_path, steps=2)
    run_trainer(folder, config)
    lines = [orjson.loads(line) for line in folder.consumed.read_bytes().splitlines()]
    assert [(line["event"], line["lineage"], line["step"]) for line in lines] == [
        ("start", 0, 0), ("step", 0, 1), ("step", 0, 2),
    ]  # fmt: skip
    assert lines[1]["trained"] == ["tree-0-0", "tree-0-1", "tree-1-0", "tree-1-1"]
    assert lines[1]["filtered"] == [["tree-0-2", "unscored"], ["tree-1-2", "unscored"]]
    assert len(lines[1]["digest"]) == 32
    assert lines[1]["digest"] != lines[2]["digest"]
    assert judge(tmp_path).clean


def test_the_steps_a_killed_trainer_repeats_count_once(tmp_path: Path) -> None:
    folder, config = make_run(tmp_path, steps=5)
    run_trainer(folder, config)
    digests = [orjson.loads(line)["digest"] for line in folder.consumed.read_bytes().splitlines()[1:]]
    shutil.rmtree(folder.checkpoints / "step-000005")
    run_trainer(folder, config)
    lines = [orjson.loads(line) for line in folder.consumed.read_bytes().splitlines()]
    assert [(line["event"], line["step"]) for line in lines[-2:]] == [("start", 4), ("step", 5)]
    assert lines[-1]["digest"] == digests[-1]
    verdict = judge(tmp_path, ["tree-4-0"])
    assert (verdict.steps, verdict.trained, verdict.clean) == (5, 20, True)


def test_a_line_that_a_kill_cut_short_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "consumed.jsonl"
    with ConsumedLog(path) as log:
        log.start(0, 0)
    whole = path.read_bytes()
    for half in (b'{"event"', b"x" * 200_000):
        path.write_bytes(whole + half)
        with ConsumedLog(path) as log:
            pass
        assert path.read_bytes() == whole
        path.write_bytes(half)
        with ConsumedLog(path) as log:
            pass
        assert path.read_bytes() == b""


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE trees SET state = 'pending', step = NULL WHERE tree_id = 'tree-0-0'",
        "UPDATE trees SET step = 2 WHERE tree_id = 'tree-0-0'",
        "UPDATE trees SET state = 'filtered' WHERE tree_id = 'tree-0-0'",
        "UPDATE trees SET state = 'trained' WHERE tree_id = 'tree-0-2'",
    ],
)
def test_a_ledger_that_says_otherwise_is_found_out(tmp_path: Path, damage: str) -> None:
    folder, config = make_run(tmp_path, steps=2)
    run_trainer(folder, config)
    with sqlite3.connect(folder.journal) as vandal:
        assert vandal.execute(damage).rowcount == 1
    vandal.close()
    assert len(judge(tmp_path).disagree) == 1


def test_a_tree_trained_twice_or_lost_is_found_out(tmp_path: Path) -> None:
    folder, config = make_run(tmp_path, steps=2)
    run_trainer(folder, config)
    assert judge(tmp_path, ["tree-0-0", "never-seen"]).lost == ("never-seen",)
    lines = folder.consumed.read_bytes().splitlines()
    doubled = orjson.loads(lines[2])
    doubled["trained"].append("tree-0-0")
    folder.consumed.write_bytes(b"\n".join([*lines[:2], orjson.dumps(doubled)]))
    assert judge(tmp_path).doubled == ("tree-0-0",)
    folder.consumed.write_bytes(b"\n".join([lines[0], lines[2]]))
    with pytest.raises(AssertionError, match="step 2 follows step 0"):
        read_consumption(folder.consumed)
