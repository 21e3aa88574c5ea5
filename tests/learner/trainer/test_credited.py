"""From credit to the loss: whole objectives of papers, worked out by hand on tiny trees."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from learner.trainer.checkpoint import Checkpoints
from learner.trainer.costs import ModelShape
from learner.trainer.intake import ZERO_VARIANCE, StepInput, prepare
from learner.trainer.model import Policy
from learner.trainer.step import make_optimizer
from matpo.config import Clip, Learner
from matpo.objective.chosen import token_loss
from matpo.objective.tokens import Tokens
from protocols.records import EpisodeTree, Joint, Trajectory
from tests.learner.trainer.models import tiny_model
from tests.learner.trainer.test_exactness import CPU
from tests.learner.trainer.test_step import config_with
from tests.matpo.trees import trajectory, tree

SHAPE = ModelShape(body_parameters=1, trained_parameters=1, layers=1, attention_width=1, hidden=1, vocabulary=13)


def prepared(trees: list[EpisodeTree], **learner: object) -> StepInput:
    """What a step is given, whatever topology the trees are of."""
    config = config_with().model_copy(update={"learner": Learner.model_validate(learner)})
    return prepare(trees, config, current=0, shape=SHAPE, device=CPU)


def with_ratios(played: Trajectory, *ratios: float) -> Trajectory:
    """Sampled so that π/μ is `ratios` where the policy now gives every token probability e^-1."""
    return replace(played, logprobs=np.array([-1 - math.log(ratio) for ratio in ratios], np.float32))


def clip_objective(trees: list[EpisodeTree]) -> float:
    """The paper's objective of what the trainer makes of these trees, π being e^-1 everywhere."""
    (batch,) = prepared(trees, credit="broadcast", weighting="tree").micro_batches
    tokens = Tokens(torch.full_like(batch.behaviour_T, -1.0), batch.behaviour_T, batch.advantage_T)
    loss_T = token_loss(Clip(), tokens).loss_T
    return -float((batch.weight_T.double() * loss_T.double()).sum())


def test_matpos_objective_of_a_planner_with_two_workers() -> None:
    # arXiv 2510.04678: (1/G) Σ_i 1/(tokens of tree i) Σ_t min(R A_i, clip(R, 0.8, 1.2) A_i), A = ±0.5 / std.
    good = tree(
        1.0,
        with_ratios(trajectory("..x.x"), 1.5, 1.0),
        with_ratios(trajectory("...x", role="worker", parent=(0, 1), seed=1), 0.5),
        with_ratios(trajectory(".xxx", role="worker", parent=(0, 1), seed=2), 1.1, 1.3, 0.9),
        name="good",
    )
    bad = tree(0.0, with_ratios(trajectory(".xx", seed=3), 0.7, 1.4), name="bad", episode=1)
    up = (1.2 + 1.0 + 0.5 + 1.1 + 1.2 + 0.9) / 6
    down = (0.8 + 1.4) / 2
    by_hand = 0.5 * (up - down) * 0.5 / (math.sqrt(0.5) + 1e-6)
    assert clip_objective([good, bad]) == pytest.approx(by_hand, abs=1e-6)


def test_a_long_workers_tokens_beyond_its_planners_length_are_trained_too() -> None:
    # The released code multiplies the worker's advantages by the planner's mask, which is shorter and elsewhere.
    good = tree(
        1.0,
        with_ratios(trajectory(".x"), 1.0),
        with_ratios(trajectory("..xxxx", role="worker", parent=(0, 1)), 1.0, 1.0, 1.0, 0.5),
        name="good",
    )
    bad = tree(0.0, with_ratios(trajectory(".x", seed=3), 1.0), name="bad", episode=1)
    by_hand = 0.5 * (4.5 / 5 - 1.0) * 0.5 / (math.sqrt(0.5) + 1e-6)
    assert clip_objective([good, bad]) == pytest.approx(by_hand, abs=1e-6)


END = 12


def ends(played: Trajectory) -> Trajectory:
    """Its last token is the end of the sequence."""
    tokens = np.minimum(played.tokens, END - 1)
    tokens[-1] = END
    return replace(played, tokens=tokens)


def test_magrpo_trains_every_response_with_its_end_once_and_nothing_that_was_not_sampled() -> None:
    # Two agents, two turns: the second turn's acts carry the whole history and only their own response is trained.
    acts = [ends(trajectory(".xx" + "x" * n, role=("planner", "worker")[n % 2], seed=n)) for n in range(4)]
    for first in range(4):
        history = np.concatenate([acts[first].tokens, np.array([1, 2], np.int32)])
        for sample in range(2):
            fork = ends(trajectory("." * len(history) + "xx", role=acts[first].role, parent=(first, 1), seed=sample))
            tokens = np.concatenate([history, fork.tokens[len(history) :]])
            acts.append(replace(fork, tokens=tokens))
    joints = [Joint(members=(0, 1), reward=1.0), Joint(members=(2, 3), reward=0.0)]
    for before, (a, b) in enumerate(((4, 6), (8, 10))):
        joints += [Joint(members=(a + n, b + n), after=before, reward=float(2 * n)) for n in range(2)]
    one, two = (tree(1.0, *acts, joints=tuple(joints), name=f"t{n}", episode=n) for n in range(2))
    taken = prepared([one, two], credit="magrpo", weighting="constant", constant_tokens=1)
    assert taken.trained == ("t0", "t1")
    (batch,) = taken.micro_batches
    sampled = sum(len(played.versions) for played in acts)
    assert len(batch.advantage_T) == 2 * sampled == 2 * (2 + 3 + 4 + 5 + 8 * 2)
    ended = int((batch.target_K[batch.scored_T] == END).sum())
    assert ended == 2 * len(acts)
    # A sum over tokens, mean over trees, as in the paper: no token of a long response weighs less.
    assert batch.weight_T.tolist() == pytest.approx([0.5] * (2 * sampled))


def test_groups_without_differences_stay_or_go_and_are_counted() -> None:
    flat = [tree(0.5, name=f"flat{n}", episode=n, group="g1") for n in range(2)]
    varied = [tree(float(n), trajectory(".x", seed=n), name=f"varied{n}", episode=n) for n in range(2)]
    kept = prepared([*flat, *varied])
    assert (kept.report.zero_variance_groups, kept.report.filtered_trees, len(kept.samples)) == (1, 0, 4)
    filtered = prepared([*flat, *varied], zero_variance="filter")
    assert filtered.filtered == (("flat0", ZERO_VARIANCE), ("flat1", ZERO_VARIANCE))
    assert (filtered.report.zero_variance_groups, filtered.trained) == (1, ("varied0", "varied1"))
    # The others share the step alone.
    assert [sample.weight for sample in filtered.samples] == [0.5, 0.5]


def test_a_group_nobody_scored_is_unscored_and_not_one_without_differences() -> None:
    taken = prepared([tree(None, name=f"t{n}", episode=n) for n in range(2)], zero_variance="filter")
    assert [reason for _, reason in taken.filtered] == ["unscored", "unscored"]
    assert taken.report.zero_variance_groups == 0


def test_what_a_scheme_remembers_goes_from_step_to_step() -> None:
    trees = [tree(float(n), trajectory(".x", seed=n), name=f"t{n}", episode=n) for n in range(2)]
    config = config_with(credit={"name": "role_baseline", "decay": 0.5})
    first = prepare(trees, config, current=0, shape=SHAPE, device=CPU)
    assert first.memory == {"planner": 0.5}  # 0 and then 1
    second = prepare(trees, config, current=1, shape=SHAPE, device=CPU, memory=first.memory)
    assert sorted(sample.advantage for sample in second.samples) == [-0.5, 0.5]


def test_what_a_scheme_remembers_is_in_the_checkpoint(tmp_path: Path) -> None:
    policy = Policy.of(tiny_model("qwen3"), Learner())
    optimizer = make_optimizer(policy, Learner())
    kept = Checkpoints(tmp_path / "checkpoints", keep=1)
    kept.save(policy, optimizer, step=3, lineage=0, model=tmp_path, memory={"planner": 0.25})
    state = kept.restore(policy, optimizer)
    assert state is not None
    assert (state.step, state.credit) == (3, {"planner": 0.25})
