"""Steps, schedules and what is refused, on tiny models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from learner.trainer.costs import ModelShape
from learner.trainer.intake import prepare, read_trees
from learner.trainer.model import Policy
from learner.trainer.pack import pack
from learner.trainer.plan import Sample
from learner.trainer.publish import to_weights
from learner.trainer.report import StepReport
from learner.trainer.setup import make_deterministic
from learner.trainer.step import Fixed, accumulate, learning_rate, make_optimizer, train_step
from matpo.config import Config, Decoupled, Dppo, Gspo, Learner, M2po, Objective, Reinforce, Tis
from matpo.errors import UserError
from matpo.objective.report import merged_policy
from protocols.codec import encode_tree
from protocols.messages import Batch
from protocols.records import EpisodeTree
from protocols.weights import weights_digest
from tests.learner.trainer.models import reference_gradient, sample, tiny_model
from tests.learner.trainer.test_exactness import CPU, random_rows, relative_difference
from tests.matpo.trees import OTHER, trajectory, tree

SHAPE = ModelShape(body_parameters=1, trained_parameters=1, layers=1, attention_width=1, hidden=1, vocabulary=13)


def step_once(learner: Learner, rows: list[Sample], *, steps: int = 1) -> tuple[Policy, list[StepReport]]:
    make_deterministic(threads=1, seed=0)
    policy = Policy.of(tiny_model("qwen3"), learner)
    optimizer = make_optimizer(policy, learner)
    batches = pack(rows, limit_tokens=100, device=CPU)
    return policy, [
        train_step(policy, optimizer, batches, learner, step=step + 1, steps=steps) for step in range(steps)
    ]


def digest(policy: Policy) -> str:
    return weights_digest(to_weights(policy.parameters, "float32"))


def test_a_step_is_reproducible_bit_for_bit() -> None:
    rows = random_rows(20, seed=4)
    one, first = step_once(Learner(lr=1e-3), rows, steps=3)
    other, second = step_once(Learner(lr=1e-3), rows, steps=3)
    assert digest(one) == digest(other)
    assert [(r.loss, r.grad_norm, r.roles) for r in first] == [(r.loss, r.grad_norm, r.roles) for r in second]


def test_report_counts_tokens_before_and_after_merging() -> None:
    rows = [sample([1, 2, 3, 4], [3]), sample([1, 2, 3, 5, 6], [3, 4], role="worker")]
    _, (report,) = step_once(Learner(), rows)
    assert (report.tokens, report.unique_tokens, report.sampled_tokens, report.scored_tokens) == (3 + 4, 4, 3, 3)
    assert {role: figures.tokens for role, figures in report.roles.items()} == {"planner": 1, "worker": 2}
    assert report.updates == 1


def test_first_adam_step_moves_each_weight_by_the_learning_rate_against_its_gradient() -> None:
    rows = random_rows(8, seed=5)
    before = dict(tiny_model("qwen3").named_parameters())
    policy, _ = step_once(Learner(lr=1e-3), rows)
    _, grads = reference_gradient(tiny_model("qwen3"), rows, Dppo())
    name = "model.layers.0.mlp.up_proj.weight"
    moved = policy.parameters[name].detach() - before[name].detach()
    large = grads[name].abs() > 0.1 * grads[name].abs().max()
    assert torch.allclose(moved[large], -1e-3 * grads[name][large].sign(), rtol=1e-3)


def test_a_later_optimizer_step_of_a_batch_measures_against_the_policy_at_the_start_of_the_step() -> None:
    rows = random_rows(6, seed=6)
    policy = Policy.of(tiny_model("llama"), Learner())
    batches = pack(rows, limit_tokens=1000, device=CPU)
    first = accumulate(policy, batches, Decoupled())
    with torch.no_grad():
        policy.parameters["model.layers.0.mlp.up_proj.weight"].mul_(3.0)
    moved = accumulate(policy, batches, Decoupled(), Fixed(old=first.logp))
    (behaviour, weight, advantage) = (batches[0].behaviour_T, batches[0].weight_T, batches[0].advantage_T)
    ratio = (moved.logp[0] - first.logp[0]).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    expected = -(weight * (first.logp[0] - behaviour).exp().clamp(max=2) * surrogate).sum()
    assert not torch.allclose(ratio, torch.ones_like(ratio), atol=0.05)
    assert moved.loss == pytest.approx(expected.item(), rel=1e-5)


def test_several_optimizer_steps_per_batch_are_all_taken() -> None:
    _, (report,) = step_once(Learner(optimizer_steps_per_batch=3), random_rows(6, seed=6))
    assert report.updates == 3


def test_a_gradient_that_is_not_finite_is_skipped_and_reported() -> None:
    rows = random_rows(3, seed=7)
    rows[0] = Sample(**{name: getattr(rows[0], name) for name in rows[0].__slots__} | {"advantage": float("inf")})
    policy, (report,) = step_once(Learner(objective=Tis()), rows)
    assert report.updates == 0
    assert digest(policy) == digest(Policy.of(tiny_model("qwen3"), Learner()))


def test_a_step_without_samples_changes_nothing() -> None:
    policy, (report,) = step_once(Learner(), [])
    assert (report.updates, report.loss, report.roles) == (0, 0.0, {})
    assert digest(policy) == digest(Policy.of(tiny_model("qwen3"), Learner()))


def test_learning_rate_warms_up_and_then_follows_half_a_cosine() -> None:
    constant = Learner(lr=1.0, warmup_steps=3)
    assert [learning_rate(constant, step=n, steps=10) for n in (1, 2, 3, 4, 10)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    cosine = Learner(lr=1.0, lr_schedule="cosine")
    assert [learning_rate(cosine, step=n, steps=4) for n in (1, 3)] == pytest.approx([1.0, 0.5])
    assert learning_rate(cosine, step=4, steps=4) > 0
    both = Learner(lr=1.0, lr_schedule="cosine", warmup_steps=2)
    assert [learning_rate(both, step=n, steps=6) for n in (1, 2, 3, 5)] == pytest.approx([1 / 3, 2 / 3, 1.0, 0.5])


def test_bfloat16_computes_about_the_same_gradient_with_float32_weights() -> None:
    rows = random_rows(10, seed=8)
    _, reference = reference_gradient(tiny_model("qwen3"), rows, Tis())
    policy = Policy.of(tiny_model("qwen3"), Learner(dtype="bfloat16"))
    accumulate(policy, pack(rows, limit_tokens=1000, device=CPU), Tis())
    grads = {name: p.grad for name, p in policy.parameters.items() if p.grad is not None}
    assert {grad.dtype for grad in grads.values()} == {torch.float32}
    assert relative_difference(grads, reference) < 0.2


def test_a_folder_without_weights_is_refused_in_one_line(tmp_path: Path) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"cannot be loaded: .*; give the folder of a Hugging Face causal model"
    ) as error:
        Policy.load(tmp_path, Learner())
    assert "\n" not in str(error.value)


def config_with(**learner: object) -> Config:
    return Config.model_validate(
        {
            "model": {"path": "."},
            "data": {name: {"kind": "world"} for name in ("train", "evaluation")},
            "episode": {
                "roles": {"planner": {"system": "p"}, "worker": {"system": "w", "sampling": {"temperature": 0.5}}}
            },
            "learner": learner,
        }
    )


def good_and_bad() -> list[EpisodeTree]:
    worker = trajectory(".xx", role="worker", parent=(0, 0))
    return [tree(1.0, trajectory("..x"), worker, name="good"), tree(0.0, trajectory(".x"), name="bad", episode=1)]


def test_intake_gives_each_trajectory_its_trees_advantage_its_weight_and_its_roles_temperature() -> None:
    (batch,) = prepare(
        good_and_bad(), config_with(credit={"normalise_by_std": False}), current=3, shape=SHAPE, device=CPU
    ).micro_batches
    first = batch.advantage_T > 0
    assert batch.advantage_T[first].tolist() == [0.5, 0.5, 0.5]
    assert batch.weight_T[first].tolist() == pytest.approx([1 / 6] * 3)
    assert batch.advantage_T[~first].tolist() == [-0.5]
    assert batch.weight_T[~first].tolist() == pytest.approx([1 / 2])
    worker = batch.role_T == batch.roles.index("worker")
    assert batch.temperature_K[batch.scored_T[worker]].tolist() == [0.5, 0.5]


def test_every_sampled_token_of_two_workers_is_trained_wherever_the_planner_sampled_its_own() -> None:
    # Released MATPO masks workers with the planner's mask: of these five worker tokens it would train none.
    good = tree(
        1.0,
        trajectory("..x"),
        trajectory("....xxx", role="worker", parent=(0, 0)),
        trajectory(".....x.x", role="worker", parent=(0, 0)),
        name="good",
    )
    config = config_with(credit={"normalise_by_std": False})
    bad = tree(0.0, trajectory(".x"), name="bad", episode=1)
    (batch,) = prepare([good, bad], config, current=0, shape=SHAPE, device=CPU).micro_batches
    worker = batch.role_T == batch.roles.index("worker")
    assert batch.advantage_T[worker].tolist() == [0.5] * 5
    assert batch.advantage_T[~worker].tolist() in ([0.5, -0.5], [-0.5, 0.5])
    assert batch.weight_T[worker].tolist() == pytest.approx([1 / 12] * 5)


def test_intake_reports_rewards_and_staleness() -> None:
    report = prepare(good_and_bad(), config_with(), current=3, shape=SHAPE, device=CPU).report
    assert (report.groups, report.trees, report.trajectories, report.filtered_trees) == (1, 2, 3, 0)
    assert (report.reward_mean, report.reward_parts) == (0.5, {"answer": 0.5})
    assert (report.staleness_mean, report.staleness_max) == (3.0, 3)
    assert (report.all_fail_groups, report.all_pass_groups) == (0.0, 0.0)


def test_trees_no_actor_of_this_run_can_have_made_are_filtered_with_the_reason() -> None:
    outside = trajectory("..x")
    strange = [
        tree(1.0, trajectory("..x", role="critic"), name="role"),
        tree(1.0, trajectory("x.x"), name="first"),
        tree(1.0, replace(outside, tokens=outside.tokens + 13), name="token"),
    ]
    taken = prepare([*good_and_bad(), *strange], config_with(), current=0, shape=SHAPE, device=CPU)
    assert dict(taken.filtered) == {
        "role": "unknown_role", "first": "first_token_sampled", "token": "token_outside_vocabulary"
    }  # fmt: skip
    assert taken.trained == ("good", "bad")


def test_groups_of_one_task_come_together_even_if_their_trees_are_mixed() -> None:
    trees = [tree(float(n % 2), name=f"t{n}", group=f"g{n // 2 % 2}", task=OTHER, episode=n) for n in range(8)]
    taken = prepare(trees, config_with(), current=0, shape=SHAPE, device=CPU)
    assert taken.trained == ("t0", "t1", "t4", "t5", "t2", "t3", "t6", "t7")


def test_a_batch_survives_the_wire() -> None:
    trees = good_and_bad()
    encoded = [encode_tree(one) for one in trees]
    batch = Batch(step=1, frame_counts=tuple(len(frames) for frames in encoded))
    found = read_trees(batch, [frame for frames in encoded for frame in frames])
    assert [one.tree_id for one in found] == ["good", "bad"]
    assert np.array_equal(found[0].trajectories[1].tokens, trees[0].trajectories[1].tokens)
    with pytest.raises(ValueError, match="announces"):
        read_trees(batch, encoded[0])


def test_the_ess_guard_takes_smaller_steps_the_fewer_tokens_carry_the_gradient() -> None:
    rows = random_rows(8, seed=9)
    _, (report,) = step_once(Learner(lr=1e-3, objective=Tis(), ess_guard=True), rows)
    share = merged_policy(list(report.roles.values())).effective_samples
    assert 0 < share < 0.9
    assert report.lr == pytest.approx(1e-3 * share**0.5)


@pytest.mark.parametrize("objective", [Decoupled(), M2po(), Gspo(), Tis(sequence_mask=0.1)], ids=lambda o: o.name)
def test_objectives_that_look_beyond_a_token_take_several_optimizer_steps_per_batch(objective: Objective) -> None:
    learner = Learner(lr=1e-2, objective=objective, optimizer_steps_per_batch=3)
    policy, (report,) = step_once(learner, random_rows(8, seed=10))
    assert report.updates == 3
    assert digest(policy) != digest(Policy.of(tiny_model("qwen3"), learner))


def test_the_same_gradient_again_points_the_way_the_ones_before_it_did() -> None:
    _, reports = step_once(Learner(lr=1e-6, objective=Reinforce()), random_rows(8, seed=11), steps=3)
    assert reports[0].gradient_cosine is None
    assert [r.gradient_cosine for r in reports[1:]] == pytest.approx([1.0, 1.0], abs=1e-3)
