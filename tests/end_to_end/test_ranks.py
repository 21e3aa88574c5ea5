"""Two ranks through the real commands: our own launcher, torchrun and accelerate, with a rank killed in the middle."""

from __future__ import annotations

import socket
from functools import partial
from pathlib import Path

import psutil
import pytest
from accelerate.commands.config.config_args import ClusterConfig
from safetensors.numpy import load_file

from matpo.folder import RunFolder
from tests.end_to_end.processes import (
    QUICKSTART,
    ROOT,
    SHORT,
    Command,
    begun,
    matpo,
    only_run,
    short_run,
    started,
    summary,
)
from tests.end_to_end.test_kill import nothing_is_lost_or_doubled, reached, wait_until

STEPS = 6
PAUSES = 'learner.collapse={action = "pause", signs = 1, patience_steps = 1, mismatch_kl = 1e-9}'
"""At the first tokens that newer weights than their own are trained on."""
SHIPPED = ("one_machine", "two_machines")
LAUNCHERS = {
    # Without the two dashes torchrun takes our --run for an abbreviation of its own --run-path.
    "torchrun": "torch.distributed.run --nproc-per-node 2 --max-restarts 3 --master-addr {} --master-port {} -m --",
    "accelerate": "accelerate.commands.launch --config_file configs/accelerate/one_machine.yaml --num_processes 2"
    " --max_restarts 3 --main_process_ip {} --main_process_port {} -m",
}
"""Modules and their options, up to the name of ours."""


def rank_processes(command: Command, rank: int) -> list[psutil.Process]:
    """The trainer process of a rank."""
    found = command.descendants("learner.trainer")
    return [process for process in found if process.environ().get("RANK") == str(rank)]


def has_rank(command: Command, rank: int) -> bool:
    return bool(rank_processes(command, rank))


def assert_trained(run: Path) -> None:
    """The run is complete, its ledger exact and its newest checkpoint sound."""
    assert summary(run)["steps"] == STEPS
    doctor = matpo("doctor", str(run))
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    nothing_is_lost_or_doubled(run)
    weights = load_file(run / "checkpoints" / f"step-{STEPS:06d}" / "model.safetensors")
    before = load_file(ROOT / "models" / "quickstart" / "model.safetensors")
    assert weights.keys() == before.keys()
    assert all(abs(weights[name] - before[name]).max() < 0.1 for name in weights)
    assert any((weights[name] != before[name]).any() for name in weights)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_on_two_ranks_survives_the_kill_of_one_with_an_exact_ledger(tmp_path: Path) -> None:
    more = [f"run.steps={STEPS}", "learner.ranks=2", "hub.lease_s=8.0"]
    with started(*short_run(tmp_path, *more)) as command:
        wait_until(lambda: any(tmp_path.iterdir()), command, limit_s=60, what="run folder")
        run = only_run(tmp_path)
        for rank, step in ((1, 1), (0, 3)):
            wait_until(partial(reached, run, step), command, limit_s=240, what=f"step {step}")
            wait_until(partial(has_rank, command, rank), command, limit_s=60, what=f"rank {rank}")
            for process in rank_processes(command, rank):
                process.kill()
        output, _ = command.process.communicate(timeout=400)
    assert command.process.returncode == 0, output
    assert_trained(run)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_that_a_launcher_started_are_started_again_by_it_and_finish_the_run(
    tmp_path: Path, launcher: str
) -> None:
    run = RunFolder(tmp_path / "run")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        options = LAUNCHERS[launcher].format(*free.getsockname()).split()
    learner = ["learner", str(QUICKSTART), *SHORT, f"run.steps={STEPS}", "--run", str(run.path)]
    with begun("-m", *options, *learner) as ranks:
        wait_until(lambda: run.hub.is_file(), ranks, limit_s=120, what="hub")
        address = run.hub_address()
        assert address is not None
        place = ["--hub", address.endpoint, "--state", str(tmp_path), "--actor-id", "actor-0"]
        with begun("-m", "actors", str(run.config), *place) as actor:
            wait_until(partial(reached, run.path, 2), ranks, limit_s=240, what="step 2")
            for process in rank_processes(ranks, 1):
                process.kill()
            output, _ = ranks.process.communicate(timeout=400)
            assert ranks.process.returncode == 0, output
            actor.process.communicate(timeout=60)
    assert_trained(run.path)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("restarts", "code"), [(3, 0), (0, 1)])
def test_a_run_that_pauses_is_not_started_again_by_the_launcher(tmp_path: Path, restarts: int, code: int) -> None:
    """A launcher starts again, while it may, what did not end with 0; then it ends with 1 itself."""
    run = RunFolder(tmp_path / "run")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        options = LAUNCHERS["accelerate"].format(*free.getsockname()).replace("restarts 3", f"restarts {restarts}")
    learner = ["learner", str(QUICKSTART), *SHORT, "run.steps=1000", PAUSES, "--run", str(run.path)]
    with begun("-m", *options.split(), *learner) as ranks:
        wait_until(lambda: run.hub.is_file(), ranks, limit_s=120, what="hub")
        address = run.hub_address()
        assert address is not None
        place = ["--hub", address.endpoint, "--state", str(tmp_path), "--actor-id", "actor-0"]
        with begun("-m", "actors", str(run.config), *place) as actor:
            output, _ = ranks.process.communicate(timeout=400)
            actor.process.kill()
    assert ranks.process.returncode == code, output
    assert "error: training is paused and saved at step" in output
    for rank in ("trainer", "trainer-1"):
        assert run.log(rank).read_text(encoding="utf-8").count('"trainer ready"') == 1, "it was not started again"
    assert list(run.checkpoints.glob("step-*")) and not run.summary.exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_on_two_ranks_that_pauses_says_why_and_ends_with_a_code_of_its_own(tmp_path: Path) -> None:
    done = matpo(*short_run(tmp_path, "run.steps=1000", "learner.ranks=2", PAUSES), timeout_s=400)
    assert done.returncode == 3, done.stdout + done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: training is paused and saved at step ")
    assert list((only_run(tmp_path) / "checkpoints").glob("step-*"))


def test_the_shipped_settings_are_ones_accelerate_reads() -> None:
    one, two = (ClusterConfig.from_yaml_file(ROOT / "configs/accelerate" / f"{name}.yaml") for name in SHIPPED)
    assert (one.num_machines, one.num_processes) == (1, 8)
    assert (two.num_machines, two.num_processes, two.rdzv_backend) == (2, 16, "static")
