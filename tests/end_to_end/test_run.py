"""One short quick-start run is the specification of the whole loop."""

from __future__ import annotations

from pathlib import Path

import pytest

from matpo.load import load_config
from matpo.metrics import read_metrics
from tests.end_to_end.processes import matpo, only_run, short_run, summary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
STEPS = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("runs")
    done = matpo(*short_run(parent, f"run.steps={STEPS}"))
    assert done.returncode == 0, done.stdout + done.stderr
    return only_run(parent)


def test_a_run_takes_its_steps_and_says_how_it_went(run: Path) -> None:
    figures = summary(run)
    assert figures["steps"] == STEPS


def test_the_resolved_settings_load_back(run: Path) -> None:
    assert load_config(run / "config.json").run.steps == STEPS


def test_data_of_older_weights_was_trained_on(run: Path) -> None:
    steps = [line for _, line in read_metrics(run / "metrics.jsonl") if line["stage"] == "trainer"]
    assert len(steps) >= STEPS


def test_on_one_machine_weights_are_read_where_the_learner_wrote_them(run: Path) -> None:
    status = [line for _, line in read_metrics(run / "metrics.jsonl") if line["stage"] == "hub"]
    assert status[-1]["weights_served_bytes"] == 0


def test_the_journal_alone_gives_the_same_weights_bit_for_bit(run: Path) -> None:
    replay = matpo("replay", str(run))
    assert replay.returncode == 0, replay.stdout + replay.stderr


def test_the_doctor_finds_sums_that_add_up(run: Path) -> None:
    doctor = matpo("doctor", str(run))
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
