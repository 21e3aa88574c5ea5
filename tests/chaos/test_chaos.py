"""The quick start under thirty faults in a row: nothing is lost, nothing is doubled, and it goes on learning."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from tests.chaos.faults import RARE, SHARES, schedule
from tests.chaos.job import Settings
from tests.chaos.play import play, say_on_stderr
from tests.end_to_end.processes import QUICKSTART, SMALL

FAULTS, SECONDS, SEED = 32, 75.0, 6


def test_a_schedule_is_decided_by_its_seed_and_holds_every_kind_of_fault() -> None:
    hundred = list(islice(schedule(3, rare=False), 100))
    assert hundred == list(islice(schedule(3, rare=False), 100)) != list(islice(schedule(4, rare=False), 100))
    assert {(fault.verb, fault.what) for fault in hundred} == set(SHARES)
    assert sum(SHARES.values()) == 100
    assert {(f.verb, f.what) for f in islice(schedule(3, rare=True), 102)} == {*SHARES, *RARE}


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_thirty_faults_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    settings = Settings(QUICKSTART, SMALL)
    report = await play(tmp_path, settings, seed=SEED, faults=FAULTS, seconds=SECONDS, rare=False, say=say_on_stderr)
    assert report.faults >= 30
    assert (report.lost, report.doubled, report.adds_up) == (0, 0, True), report
    assert report.tasks == report.tasks_trained + report.tasks_filtered + report.tasks_pending
    assert report.exit_code == 130
    assert report.steps >= 3
