"""A run with three actors that stall at random, and perhaps a trainer that dies, is replayed to the same weights."""

from __future__ import annotations

import random
import re
import signal
import subprocess
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.chaos.consumption import judge
from tests.end_to_end.processes import Command, matpo, only_run, short_run, started
from tests.end_to_end.test_kill import reached, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 8


def delay(command: Command, moments: random.Random) -> None:
    """Stop a random actor for up to a second."""
    actors = command.descendants("actors", f"actor-{moments.randrange(3)}")
    try:
        for process in actors:
            process.send_signal(signal.SIGSTOP)
        command.process.wait(timeout=moments.uniform(0.1, 1.0))
    except (subprocess.TimeoutExpired, psutil.NoSuchProcess):
        pass
    for process in actors:
        if process.is_running():
            process.send_signal(signal.SIGCONT)


def replayed(run: Path) -> str:
    """Digest of the weights that a replay ends with, which says that they equal the run's."""
    done = matpo("replay", str(run))
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(rf"replayed {STEPS} steps: weights (\w+)", done.stdout)
    assert found is not None and "equal" in done.stdout
    return found[1]


@pytest.mark.parametrize("kill", [False, True], ids=["undisturbed trainer", "killed trainer"])
def test_two_replays_of_a_run_give_its_weights(kill: bool, tmp_path: Path) -> None:
    moments = random.Random(f"replay {kill}")
    with started(*short_run(tmp_path, f"run.steps={STEPS}", "actor.count=3", "actor.concurrency=8")) as command:
        wait_until(lambda: any(tmp_path.iterdir()), command, limit_s=60, what="run folder")
        run = only_run(tmp_path)
        for step in range(1, STEPS - 1):
            wait_until(partial(reached, run, step), command, limit_s=240, what=f"step {step}")
            delay(command, moments)
            if kill and step == STEPS // 2 + 1:
                for process in command.descendants("learner.trainer"):
                    process.kill()
        output, _ = command.process.communicate(timeout=300)
    assert command.process.returncode == 0, output
    assert replayed(run) == replayed(run)
    verdict = judge(run)
    assert (verdict.steps, verdict.clean) == (STEPS, True), verdict
