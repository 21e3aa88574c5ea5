"""Two ranks train like one: gradients, steps, reports and checkpoints, in real processes over gloo."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import JsonValue
from safetensors.torch import load_file
from torch import Tensor

from learner.trainer.checkpoint import OPTIMIZER
from learner.trainer.model import Policy
from learner.trainer.pack import micro_batch, pack
from learner.trainer.ranks import ALONE, joined
from learner.trainer.report import StepReport
from learner.trainer.setup import make_deterministic
from learner.trainer.step import accumulate
from matpo.config import Learner, Tis
from matpo.errors import UserError
from matpo.metrics import read_metrics
from tests.learner.trainer import rank_cases
from tests.learner.trainer.models import Family
from tests.learner.trainer.pair import Pair
from tests.learner.trainer.rank_cases import Found
from tests.learner.trainer.runs import JournalHub, ledger, make_run, run_trainer
from tests.learner.trainer.test_exactness import CPU, random_rows, relative_difference


def gradients_of_one(family: Family, *, tied: bool = True) -> tuple[float, dict[str, Tensor]]:
    policy = Policy.of(rank_cases.model_of(family, tied=tied), Learner())
    done = accumulate(policy, pack(random_rows(12, seed=3), limit_tokens=40, device=CPU), Tis())
    return done.loss, {name: p.grad for name, p in policy.parameters.items() if p.grad is not None}


def test_two_ranks_give_the_gradients_of_one(pair: Pair, tmp_path: Path) -> None:
    first, second = pair.do(rank_cases.gradients, tmp_path)
    kinds: list[tuple[Family, bool]] = [("qwen3", True), ("llama", False)]
    for number, (family, tied) in enumerate(kinds):
        loss, expected = gradients_of_one(family, tied=tied)
        assert first["losses"][number] + second["losses"][number] == pytest.approx(loss, rel=1e-5)
        assert relative_difference(load_file(tmp_path / f"{family}.safetensors"), expected) < 1e-5
    policy = Policy.of(rank_cases.model_of("qwen3"), Learner())
    done = accumulate(policy, [micro_batch(random_rows(5, seed=4), CPU)], Tis())
    expected = {name: p.grad for name, p in policy.parameters.items() if p.grad is not None}
    assert first["losses"][2] == pytest.approx(done.loss) and second["losses"][2] == 0.0
    assert relative_difference(load_file(tmp_path / "uneven.safetensors"), expected) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_two_gpus_give_the_gradients_of_one_cpu(tmp_path: Path) -> None:
    with Pair(rank_timeout_s=60, device="cuda") as gpus:
        first, second = gpus.do(rank_cases.gradients, tmp_path)
    loss, expected = gradients_of_one("qwen3")
    assert first["losses"][0] + second["losses"][0] == pytest.approx(loss, rel=1e-4)
    assert relative_difference(load_file(tmp_path / "qwen3.safetensors"), expected) < 1e-4
    assert relative_difference(load_file(tmp_path / "bfloat16.safetensors"), expected) < 0.2


def test_each_rank_keeps_half_of_the_weights(pair: Pair, tmp_path: Path) -> None:
    found = pair.do(rank_cases.gradients, tmp_path)
    whole = sum(p.numel() for p in rank_cases.model_of("qwen3").parameters())
    assert sum(one["local"] for one in found) == whole
    assert abs(found[0]["local"] - whole / 2) < 0.02 * whole


def test_bfloat16_on_two_ranks_means_the_same_as_on_one(pair: Pair, tmp_path: Path) -> None:
    pair.do(rank_cases.gradients, tmp_path)
    _, exact = gradients_of_one("qwen3")
    policy = Policy.of(rank_cases.model_of("qwen3"), Learner(dtype="bfloat16"))
    accumulate(policy, pack(random_rows(12, seed=3), limit_tokens=40, device=CPU), Tis())
    one = {name: p.grad for name, p in policy.parameters.items() if p.grad is not None}
    two = load_file(tmp_path / "bfloat16.safetensors")
    assert {grad.dtype for grad in two.values()} == {torch.float32}
    assert relative_difference(two, exact) < 1.5 * relative_difference(one, exact)


def test_two_ranks_give_the_gradients_of_one_where_whole_trajectories_are_looked_at(pair: Pair, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    rank_cases.trajectory_gradients(ALONE, one)
    pair.do(rank_cases.trajectory_gradients, two)
    (batch,) = pack(random_rows(12, seed=3), limit_tokens=10_000, device=CPU)
    for name, objective in rank_cases.OF_TRAJECTORIES.items():
        expected = load_file(one / f"{name}.safetensors")
        assert relative_difference(load_file(two / f"{name}.safetensors"), expected) < 1e-5
        done = accumulate(Policy.of(rank_cases.model_of("qwen3"), Learner()), [batch], objective)
        assert 0 < int(done.masked[0].sum()) < len(done.masked[0]), f"{name} drops some tokens and keeps others"


def test_the_ess_guard_slows_down_two_ranks_as_it_does_one(pair: Pair, tmp_path: Path) -> None:
    first, second = pair.do(rank_cases.guarded_rates, tmp_path)
    alone = rank_cases.guarded_rates(ALONE, tmp_path)["rates"]
    assert first == second and first["rates"] == pytest.approx(alone, rel=1e-5)
    assert all(0 < rate < 0.95 * rank_cases.ADAM.lr for rate in alone)


def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_both(pair: Pair, tmp_path: Path) -> None:
    found = pair.do(rank_cases.step_on_an_infinite_advantage_of_one_rank, tmp_path)
    assert found == [{"updates": 0, "same": True}] * 2


def test_the_report_of_two_ranks_is_that_of_one(pair: Pair, tmp_path: Path) -> None:
    first, second = pair.do(rank_cases.one_step, tmp_path)
    assert first == second
    two, one = StepReport.model_validate(first), StepReport.model_validate(rank_cases.one_step(ALONE, tmp_path))
    assert two.loss == pytest.approx(one.loss, rel=1e-5)
    assert two.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    assert (two.updates, two.sampled_tokens, two.tokens) == (one.updates, one.sampled_tokens, one.tokens)
    for role, figures in one.roles.items():
        assert two.roles[role].model_dump() == pytest.approx(figures.model_dump(), rel=1e-5, abs=1e-6)


def weights(folder: Path, step: int) -> dict[str, Tensor]:
    """Of a checkpoint: the model's or the adapter's."""
    (path,) = (folder / f"step-{step:06d}").glob("*model.safetensors")
    return load_file(path)


def checkpoint(folder: Path, step: int) -> dict[str, Tensor]:
    return weights(folder, step) | load_file(folder / f"step-{step:06d}" / OPTIMIZER)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def step_2_of(source: Path, made: Path) -> Path:
    """Another run that has only the checkpoint of step 2."""
    shutil.copytree(source / "step-000002", made / "step-000002")
    return made


@pytest.mark.parametrize("trained", rank_cases.TRAINED)
def test_two_ranks_go_on_from_their_checkpoint_bit_for_bit(pair: Pair, tmp_path: Path, trained: str) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    pair.do(rank_cases.save_at_2_and_go_on_to_4, whole, trained)
    pair.do(rank_cases.resume_at_2, step_2_of(whole, resumed), trained)
    assert_same(checkpoint(resumed, 4), checkpoint(whole, 4))


@pytest.mark.parametrize("trained", rank_cases.TRAINED)
@pytest.mark.parametrize("saved_by", [1, 2])
def test_a_checkpoint_does_not_depend_on_the_number_of_ranks(
    pair: Pair, tmp_path: Path, saved_by: int, trained: str
) -> None:
    def on(ranks: int, case: Callable[..., Found], folder: Path) -> None:
        if ranks == 2:
            pair.do(case, folder, trained)
        else:
            make_deterministic(threads=1, seed=0)
            case(ALONE, folder, trained)

    whole, again, other = (tmp_path / name for name in ("whole", "again", "other"))
    on(saved_by, rank_cases.save_at_2_and_go_on_to_4, whole)
    on(3 - saved_by, rank_cases.load_and_save_again, step_2_of(whole, again))
    assert_same(checkpoint(again, 2), checkpoint(whole, 2))
    on(3 - saved_by, rank_cases.resume_at_2, step_2_of(whole, other))
    # Sums over ranks round in another order, and Adam divides by their size: equal to float32's precision, not in bits.
    assert relative_difference(weights(whole, 4), weights(other, 4)) < 1e-6


KINDS: dict[str, tuple[dict[str, JsonValue], dict[str, JsonValue]]] = {
    "all weights": ({}, {}),
    "recomputed, near a reference": (
        {"gradient_checkpointing": "always", "objective": {"name": "dppo", "reference_kl": 0.1}},
        {},
    ),
    "an adapter, near its base": (
        {"objective": {"name": "dppo", "reference_kl": 0.1}},
        {"lora": {"rank": 3, "target_modules": ["q_proj", "down_proj"]}},
    ),
    "a merged adapter": ({}, {"lora": {"rank": 3, "target_modules": ["q_proj", "down_proj"], "publish": "merged"}}),
    "a worker's own adapter": (
        {},
        {
            "lora": {
                "rank": 3,
                "target_modules": ["q_proj", "down_proj"],
                "roles": {"planner": "shared", "worker": "own"},
            }
        },
    ),
    "outliers of the whole step": ({"objective": {"name": "m2po", "threshold": 1.0}}, {}),
    "bfloat16": ({"dtype": "bfloat16"}, {}),
    "an adapter in bfloat16": ({"dtype": "bfloat16"}, {"lora": {"rank": 3, "target_modules": ["q_proj", "down_proj"]}}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_two_ranks_ends_with_the_weights_ledger_and_publications_of_one(
    pair: Pair, tmp_path: Path, kind: str
) -> None:
    learner, model = KINDS[kind]
    learner = {"publish_dtype": "float32", "micro_batch_tokens": 64, **learner}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, config = make_run(tmp_path / "one", learner=learner, model=model)
    alone = run_trainer(one, config)
    two, _ = make_run(tmp_path / "two", learner=learner, model=model)
    with JournalHub(two) as hub:
        pair.do(rank_cases.run_trainer, two.path)
    assert list(ledger(two)) == list(ledger(one))
    assert [item.version for item in hub.published] == [item.version for item in alone.published]
    # Adam's first steps are as long for a gradient that is almost 0 as for a large one, so rounding shows in them.
    limit = 0.2 if "bfloat16" in kind else 1e-3
    keyframes = sorted(path.name for path in one.weights.glob("keyframe-*.safetensors"))
    assert keyframes == sorted(path.name for path in two.weights.glob("keyframe-*.safetensors")) != []
    for name in keyframes:
        assert relative_difference(load_file(two.weights / name), load_file(one.weights / name)) < limit
    for path in (one.checkpoints / "step-000004").glob("*model.safetensors"):
        assert relative_difference(load_file(two.checkpoints / "step-000004" / path.name), load_file(path)) < limit
    figures = [[line for _, line in read_metrics(run.metrics)] for run in (one, two)]
    assert [line["step"] for line in figures[1]] == [1, 2, 3, 4]
    for mine, theirs in zip(*figures, strict=True):
        assert (mine["tokens"], mine["trees"]) == (theirs["tokens"], theirs["trees"])
        kl, expected_kl = theirs["reference_kl"], mine["reference_kl"]
        assert kl == (expected_kl if expected_kl is None else pytest.approx(expected_kl, rel=limit, abs=1e-6))


def test_what_one_rank_says_all_hear(pair: Pair, tmp_path: Path) -> None:
    heard = {"shared": ["ab", "", "c"], "nothing": 0, "gathered": ["xxx", "xxxx"], "most": [1.0, 0.0]}
    assert pair.do(rank_cases.say, tmp_path) == [heard, heard]


def test_a_rank_that_dies_is_noticed_at_once(tmp_path: Path) -> None:
    with Pair(rank_timeout_s=3600) as pair:
        pair.begin(rank_cases.die_on_the_second_rank, tmp_path)
        assert pair.answer(0) == {"error": "RuntimeError"}


def test_a_rank_that_stands_still_is_waited_for_until_the_deadline(tmp_path: Path) -> None:
    with Pair(rank_timeout_s=3) as pair:
        pair.begin(rank_cases.stand_still_on_the_second_rank, tmp_path)
        assert pair.answer(0) == {"error": "RuntimeError"}


def test_another_number_of_ranks_than_configured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"learner\.ranks is 4, but 2 ranks were launched"), joined(Learner(ranks=4)):
        pass


def test_ranks_cannot_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="gives all ranks one GPU; set it to 'cuda'"), joined(Learner(device="cuda:0")):
        pass
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(UserError, match="rank 99 of this machine has no GPU"), joined(Learner(device="cuda")):
        pass
