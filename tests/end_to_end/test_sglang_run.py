"""The quick start with a real SGLang server, killed once on the way: it trains, and every token is what it says."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

import pytest

from matpo.metrics import read_metrics
from tests.end_to_end.audit import KEEP_ALL, Audit, audit
from tests.end_to_end.processes import QUICKSTART_SGLANG, only_run, short_run, started, summary
from tests.end_to_end.test_kill import reached, wait_until

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]
STEPS = 5
SERVER = ("sglang.launch_server",)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("runs")
    with started(*short_run(parent, f"run.steps={STEPS}", *KEEP_ALL, config=QUICKSTART_SGLANG)) as command:
        wait_until(lambda: any(parent.iterdir()), command, limit_s=60, what="run folder")
        wait_until(partial(reached, only_run(parent), 2), command, limit_s=400, what="step 2")
        for server in command.descendants(*SERVER):
            server.send_signal(signal.SIGKILL)
        assert command.process.wait(timeout=600) == 0
    return only_run(parent)


@pytest.fixture(scope="module")
def audited(run: Path) -> Audit:
    return audit(run)


def test_the_run_takes_its_steps_although_its_engine_was_killed(run: Path) -> None:
    assert summary(run)["steps"] == STEPS


def test_weights_change_while_episodes_are_played(audited: Audit) -> None:
    assert len(audited.versions) >= 3
    assert audited.mixed > 0


def test_every_token_has_the_log_probability_of_the_weights_it_names(audited: Audit) -> None:
    """Also tokens sampled right after a swap: the default swap computes their keys and values again."""
    assert audited.tokens > 1_000
    assert max(audited.worst, audited.worst_swapped) < 1e-3


def test_every_swap_tells_how_long_it_paused(run: Path) -> None:
    lines = [line for _, line in read_metrics(run / "metrics.jsonl") if line["stage"] == "weights"]
    versions = [int(str(line["version"])) for line in lines]
    assert versions == sorted(set(versions))
    assert {0, STEPS} <= set(versions)
    pauses = [float(str(line["pause_s"])) for line in lines]
    assert max(pauses) > 0
    assert min(pauses) >= 0  # a server that is starting again has nothing to pause
    assert all(pause <= float(str(line["behind_s"])) for pause, line in zip(pauses, lines, strict=True))
