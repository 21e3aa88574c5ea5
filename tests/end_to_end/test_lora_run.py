"""The quick start with `model.lora`: it learns, every token is what it says, and its checkpoint can be played with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from matpo.adapters import TENSOR_FILE
from matpo.metrics import read_metrics
from tests.end_to_end.audit import KEEP_ALL, audit
from tests.end_to_end.processes import QUICKSTART, QUICKSTART_SGLANG, SHORT, matpo, only_run, short_run, summary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
LORA = ["model.lora.rank=8", "model.lora.alpha=16.0", "learner.lr=3e-3", "learner.warmup_steps=0"]


@pytest.fixture(scope="module", params=["adapter", "merged"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("runs")
    done = matpo(*short_run(parent, *LORA, f"model.lora.publish={request.param}", *KEEP_ALL), timeout_s=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return only_run(parent)


def test_every_token_has_the_log_probability_of_the_weights_it_names(run: Path) -> None:
    found = audit(run)
    assert found.tokens > 500 and len(found.versions) >= 3
    assert found.worst < 1e-3


def test_the_adapter_learns_and_its_checkpoint_is_played_with(run: Path) -> None:
    assert summary(run)["steps"] == 6
    steps = [line for _, line in read_metrics(run / "metrics.jsonl") if line["stage"] == "trainer"]
    assert all(float(str(line["grad_norm"])) > 0 for line in steps)
    checkpoint = run / "checkpoints" / "step-000006"
    saved = load_file(checkpoint / TENSOR_FILE)
    assert all(tensor.any() for tensor in saved.values()), "every B has left 0"
    played = matpo("eval", str(QUICKSTART), *SHORT, *LORA, "--adapter", str(checkpoint))
    assert played.returncode == 0, played.stdout + played.stderr
    assert json.loads(played.stdout.splitlines()[-1])["all"]["all"]["questions"] == 12


def test_the_journal_alone_gives_the_same_adapter_bit_for_bit(run: Path) -> None:
    replay = matpo("replay", str(run))
    assert replay.returncode == 0, replay.stdout + replay.stderr


@pytest.mark.sglang
def test_a_real_server_samples_every_role_with_its_own_adapter_of_each_version(tmp_path: Path) -> None:
    roles = 'model.lora.roles={planner = "shared", worker = "own"}'
    arguments = short_run(tmp_path, "run.steps=3", *LORA, roles, *KEEP_ALL, config=QUICKSTART_SGLANG)
    done = matpo(*arguments, timeout_s=500)
    assert done.returncode == 0, done.stdout + done.stderr
    found = audit(only_run(tmp_path))
    assert found.tokens > 500 and len(found.versions) >= 2
    assert max(found.worst, found.worst_swapped) < 1e-3


def test_roles_played_by_adapters_of_their_own_and_by_none(tmp_path: Path) -> None:
    roles = 'model.lora.roles={planner = "own", worker = "frozen"}'
    done = matpo(*short_run(tmp_path, "run.steps=2", *LORA, roles), timeout_s=400)
    assert done.returncode == 0, done.stdout + done.stderr
    run = only_run(tmp_path)
    first = next(line for _, line in read_metrics(run / "metrics.jsonl") if line["stage"] == "trainer")
    figures = first["roles"]
    assert isinstance(figures, dict) and list(figures) == ["planner"]
    planner = figures["planner"]
    assert isinstance(planner, dict) and float(str(planner["mismatch_kl"])) < 1e-6
    replay = matpo("replay", str(run))
    assert replay.returncode == 0, replay.stdout + replay.stderr
    checkpoint = run / "checkpoints" / "step-000002"
    assert load_file(checkpoint / "planner" / TENSOR_FILE)
    played = matpo("eval", str(QUICKSTART), *SHORT, *LORA, roles, "--adapter", str(checkpoint))
    assert played.returncode == 0, played.stdout + played.stderr
