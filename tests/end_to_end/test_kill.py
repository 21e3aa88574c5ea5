"""kill -9 of an actor, the trainer and the hub, at random moments: the run finishes and the ledger is exact."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.end_to_end.processes import Command, matpo, only_run, short_run, started, summary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 12
PROCESS = {"actor": ("actors", "actor-0"), "trainer": ("learner.trainer",), "hub": ("learner.hub",)}


def wait_until(condition: Callable[[], bool], command: Command, *, limit_s: float, what: str) -> None:
    """Look at the run from outside until `condition` holds; there is nothing of ours to wait on."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert command.process.poll() is None, f"the run ended while the test waited for {what}"
        assert time.monotonic() < deadline, f"no {what} within {limit_s} s"
        try:
            command.process.wait(timeout=0.05)
        except subprocess.TimeoutExpired:
            continue


def query(run: Path, question: str) -> int:
    """One number from the run's journal; 0 while there is no journal yet."""
    journal = run / "journal.sqlite"
    if not journal.is_file():
        return 0
    with sqlite3.connect(f"file:{journal}?mode=ro", uri=True, timeout=5) as reader:
        try:
            (number,) = reader.execute(question).fetchone()
        except sqlite3.OperationalError:
            return 0
    return int(number or 0)


def reached(run: Path, step: int) -> bool:
    return query(run, "SELECT MAX(step) FROM trees WHERE state = 'trained'") >= step


@pytest.mark.parametrize("victim", ["actor", "trainer", "hub"])
def test_a_run_survives_the_kill_of_any_process_with_an_exact_ledger(victim: str, tmp_path: Path) -> None:
    moments = random.Random(f"matpo {victim}")
    with started(*short_run(tmp_path, f"run.steps={STEPS}", "hub.lease_s=8.0")) as command:
        wait_until(lambda: any(tmp_path.iterdir()), command, limit_s=60, what="run folder")
        run = only_run(tmp_path)
        for step in sorted(moments.sample(range(1, STEPS - 3), 2)):
            wait_until(partial(reached, run, step), command, limit_s=240, what=f"step {step}")
            wait_until(lambda: bool(command.descendants(*PROCESS[victim])), command, limit_s=60, what=victim)
            for process in command.descendants(*PROCESS[victim]):
                process.kill()
        output, _ = command.process.communicate(timeout=300)
    assert command.process.returncode == 0, output
    assert summary(run)["steps"] == STEPS
    doctor = matpo("doctor", str(run))
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    nothing_is_lost_or_doubled(run)
    # The surviving weights follow from exactly the trees the ledger calls trained, in its order: bit for bit.
    replay = matpo("replay", str(run))
    assert replay.returncode == 0, replay.stdout + replay.stderr


def nothing_is_lost_or_doubled(run: Path) -> None:
    """Every episode that was ever admitted has one place, and every tree in a place is accounted for once."""
    trained = query(run, "SELECT COUNT(*) FROM trees WHERE state = 'trained'")
    assert trained > 0
    assert trained == query(
        run, "SELECT COUNT(DISTINCT group_seq || '/' || episode) FROM trees WHERE state = 'trained'"
    )
    stated = query(run, "SELECT COUNT(*) FROM trees WHERE state IN ('pending', 'trained', 'filtered', 'evaluation')")
    assert stated == query(run, "SELECT COUNT(DISTINCT tree_id) FROM trees") == query(run, "SELECT COUNT(*) FROM trees")
