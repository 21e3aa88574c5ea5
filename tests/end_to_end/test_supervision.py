"""Who is killed, who is told to go, who comes later: the others go on, nobody is left behind, the run is finished."""

from __future__ import annotations

import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import psutil
import pytest

from matpo.folder import RunFolder
from tests.chaos.faults import Role
from tests.chaos.processes import all_below, with_role
from tests.end_to_end.processes import (
    QUICKSTART,
    ROOT,
    Command,
    environment,
    matpo,
    only_run,
    short_run,
    started,
    summary,
)
from tests.end_to_end.test_kill import nothing_is_lost_or_doubled, query, reached, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]
STEPS = 8


def under_way(command: Command, parent: Path, *, step: int) -> Path:
    """Wait until a run has taken so many steps; returns its folder."""
    wait_until(lambda: any(parent.iterdir()), command, limit_s=60, what="run folder")
    run = only_run(parent)
    wait_until(partial(reached, run, step), command, limit_s=240, what=f"step {step}")
    return run


def in_order(run: Path) -> None:
    assert summary(run)["steps"] == STEPS
    doctor = matpo("doctor", str(run))
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    nothing_is_lost_or_doubled(run)


def test_what_a_killed_run_leaves_ends_in_order_and_resuming_finishes_it(tmp_path: Path) -> None:
    with started(*short_run(tmp_path, f"run.steps={STEPS}")) as command:
        run = under_way(command, tmp_path, step=2)
        left = [process for _, process in all_below(tmp_path)]
        assert len(left) >= 7  # run, learner, hub, trainer, two actors, their tool servers
        command.process.kill()
        _, alive = psutil.wait_procs(left, timeout=150)
        assert alive == []
    assert not reached(run, STEPS)
    resumed = matpo("run", str(QUICKSTART), "--resume", str(run))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    in_order(run)


def test_a_killed_learner_is_started_again_and_the_run_finished(tmp_path: Path) -> None:
    with started(*short_run(tmp_path, f"run.steps={STEPS}")) as command:
        run = under_way(command, tmp_path, step=2)
        (learner,) = with_role(tmp_path, "learner")
        learner.kill()
        output, _ = command.process.communicate(timeout=300)
    assert command.process.returncode == 0, output
    assert list(all_below(tmp_path)) == []
    in_order(run)


def test_a_second_signal_ends_everything_at_once_and_loses_nothing(tmp_path: Path) -> None:
    with started(*short_run(tmp_path, f"run.steps={STEPS}")) as command:
        run = under_way(command, tmp_path, step=2)
        left = [process for _, process in all_below(tmp_path)]
        (trainer,) = with_role(tmp_path, "trainer")
        trainer.suspend()  # the orderly end would take its whole minute
        command.process.send_signal(signal.SIGINT)
        wait_until(lambda: "stopping" in (run / "logs" / "learner.jsonl").read_text(), command, limit_s=30, what="stop")
        command.process.send_signal(signal.SIGINT)
        output, _ = command.process.communicate(timeout=40)
        assert command.process.returncode == 130, output
        _, alive = psutil.wait_procs(left, timeout=10)
        assert alive == []
    assert matpo("doctor", str(run)).returncode == 0


def test_an_actor_may_come_and_go_and_nothing_else_notices(tmp_path: Path) -> None:
    with started(*short_run(tmp_path, "run.steps=1000000", "actor.count=1")) as command:
        run = under_way(command, tmp_path, step=1)
        address = RunFolder(run).hub_address()
        assert address is not None
        before = ours(tmp_path)
        words = ["-m", "actors", str(run / "config.json"), "--hub", address.endpoint, "--actor-id", "guest"]
        with subprocess.Popen(
            [sys.executable, *words, "--state", str(tmp_path / "guest")], cwd=ROOT, env=environment()
        ) as guest:
            log = tmp_path / "guest" / "logs" / "guest.jsonl"
            wait_until(lambda: log.is_file() and '"ready"' in log.read_text(), command, limit_s=90, what="guest")
            guest.terminate()
            assert guest.wait(timeout=60) == 0
        assert "leaving" in log.read_text()
        now = query(run, "SELECT MAX(step) FROM steps")
        wait_until(partial(reached, run, now + 2), command, limit_s=120, what="two more steps")
        assert ours(tmp_path) == before
        command.process.send_signal(signal.SIGINT)
        output, _ = command.process.communicate(timeout=120)
    assert command.process.returncode == 130, output
    assert matpo("doctor", str(run)).returncode == 0
    nothing_is_lost_or_doubled(run)


def ours(parent: Path) -> dict[int, Role]:
    """The processes below `parent`, without what actors start for a moment."""
    return {process.pid: role for role, process in all_below(parent) if role != "tool server"}
