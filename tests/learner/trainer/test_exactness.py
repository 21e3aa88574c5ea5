"""Prefix sharing, packing and the chunked head change nothing: loss and gradients are those of one-by-one training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner.trainer import head
from learner.trainer.intake import prepare
from learner.trainer.model import Policy
from learner.trainer.outliers import kept_tokens
from learner.trainer.pack import pack
from learner.trainer.plan import Sample
from learner.trainer.ranks import ALONE
from learner.trainer.step import Fixed, accumulate
from matpo.config import Config, Dppo, Learner, Objective, Tis
from matpo.credit.scheme import NOTHING
from matpo.weighting import token_weights
from protocols.records import EpisodeTree, Trajectory
from tests.learner.trainer.models import (
    GPU_HEAD_WIDTH,
    VOCABULARY,
    Family,
    reference_gradient,
    sample,
    tiny_model,
)
from tests.matpo.trees import group_of, trajectory, tree

CPU = torch.device("cpu")


@st.composite
def samples(draw: st.DrawFn) -> list[Sample]:
    """Sequences over three tokens, so that prefixes, strict prefixes and duplicates are common."""
    sequences = draw(
        st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=12), min_size=1, max_size=9).filter(
            lambda rows: sum(map(len, rows)) > 0
        )
    )
    out = []
    for number, tokens in enumerate(sequences):
        places = draw(st.sets(st.integers(1, len(tokens) - 1), min_size=1))
        out.append(sample(tokens, sorted(places), seed=number, role=draw(st.sampled_from(["planner", "worker"]))))
    return out


def relative_difference(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Largest difference of any gradient entry relative to the largest entry of its tensor.

    A tensor whose gradient nearly cancels is measured against a tenth of the largest entry of the model."""
    assert ours.keys() == reference.keys()
    largest = max(float(grad.abs().max()) for grad in reference.values())
    return max(
        float((ours[name] - grad).abs().max()) / max(float(grad.abs().max()), 0.1 * largest, 1e-30)
        for name, grad in reference.items()
    )


def gradient(
    policy: Policy, rows: Sequence[Sample], objective: Objective, limit: int
) -> tuple[float, dict[str, Tensor]]:
    batches = pack(rows, limit_tokens=limit, device=policy.device)
    done = accumulate(policy, batches, objective, Fixed(kept=kept_tokens(policy, batches, objective, ALONE)))
    grads = {name: p.grad for name, p in policy.parameters.items() if p.grad is not None}
    return done.loss, {name: grad.to(CPU, copy=True) for name, grad in grads.items()}


OBJECTIVES = [Dppo(tau=0.1), *(kind() for kind in get_args(get_args(Objective)[0]) if kind is not Dppo)]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
@settings(max_examples=5, deadline=None)
@given(rows=samples(), limit=st.sampled_from([1, 7, 20, 1000]))
def test_loss_and_gradients_equal_one_by_one_eager_training(
    family: Family, objective: Objective, rows: list[Sample], limit: int
) -> None:
    expected_loss, expected = reference_gradient(tiny_model(family), rows, objective)
    loss, found = gradient(Policy.of(tiny_model(family), Learner()), rows, objective, limit)
    assert loss == pytest.approx(expected_loss, rel=1e-5, abs=1e-6)
    assert relative_difference(found, expected) < 1e-5


@st.composite
def episodes(draw: st.DrawFn) -> list[EpisodeTree]:
    """A group: planners and their workers over three tokens; two trees are scored, others may not be."""

    def played(role: str, parent: tuple[int, int] | None) -> Trajectory:
        flags = "." + "".join(draw(st.lists(st.sampled_from(".x"), max_size=9))) + "x"
        tokens = draw(st.lists(st.integers(0, 2), min_size=len(flags), max_size=len(flags)))
        return replace(trajectory(flags, role=role, parent=parent), tokens=np.array(tokens, np.int32))

    return [
        tree(
            float(number) if number < 2 else draw(st.sampled_from([0.0, 0.3, 1.0, None])),
            *(played("planner" if not n else "worker", (0, 0) if n else None) for n in range(draw(st.integers(1, 4)))),
            name=f"t{number}",
            episode=number,
        )
        for number in range(draw(st.integers(2, 5)))
    ]


def samples_of(trees: Sequence[EpisodeTree], learner: Learner) -> list[Sample]:
    """What the loss is over, by the algorithm alone."""
    scores = learner.credit.credit(group_of(trees), NOTHING)
    weights = token_weights(trees, scores, learner)
    return [
        Sample(one.role, one.tokens, one.sampled, one.logprobs, advantage=score, weight=weight, temperature=1.0)
        for tree, row, factors in zip(trees, scores, weights, strict=True)
        for one, score, weight in zip(tree.trajectories, row, factors, strict=True)
        if score is not None and weight
    ]


@pytest.mark.parametrize("weighting", get_args(Learner.model_fields["weighting"].annotation))
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
@settings(max_examples=3, deadline=None)
@given(trees=episodes(), limit=st.sampled_from([64, 1000]))
def test_every_objective_under_every_weighting_equals_one_by_one_training(
    weighting: str, objective: Objective, trees: list[EpisodeTree], limit: int
) -> None:
    roles = {"planner": {"system": "p"}, "worker": {"system": "w"}}
    content: dict[str, object] = {
        "model": {"path": "."},
        "data": {name: {"kind": "world"} for name in ("train", "evaluation")},
        "episode": {"roles": roles},
        "learner": {"weighting": weighting, "objective": objective, "micro_batch_tokens": limit},
    }
    config = Config.model_validate(content)
    rows = samples_of(trees, config.learner)
    expected_loss, expected = reference_gradient(tiny_model("qwen3"), rows, objective)
    policy = Policy.of(tiny_model("qwen3"), config.learner)
    batches = prepare(trees, config, current=0, shape=policy.shape, device=CPU).micro_batches
    done = accumulate(policy, batches, objective, Fixed(kept=kept_tokens(policy, batches, objective, ALONE)))
    found = {name: p.grad for name, p in policy.parameters.items() if p.grad is not None}
    assert done.loss == pytest.approx(expected_loss, rel=1e-5, abs=1e-6)
    assert relative_difference(found, expected) < 1e-5


def random_rows(count: int, seed: int) -> list[Sample]:
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, VOCABULARY, 10).tolist()
    rows = []
    for number in range(count):
        tokens = shared[: int(rng.integers(1, 11))] + rng.integers(0, VOCABULARY, int(rng.integers(2, 30))).tolist()
        places = sorted(
            rng.choice(np.arange(1, len(tokens)), int(rng.integers(1, len(tokens))), replace=False).tolist()
        )
        rows.append(sample(tokens, places, seed=number, role=("planner", "worker")[number % 2]))
    return rows


def test_gradient_does_not_depend_on_micro_batch_size_or_order() -> None:
    rows = random_rows(40, seed=1)
    policy = Policy.of(tiny_model("qwen3"), Learner())
    _, reference = gradient(policy, rows, Dppo(), 10_000)
    for limit, order in ((1, 1), (64, -1), (200, 1), (10_000, -1)):
        _, found = gradient(policy, rows[::order], Dppo(), limit)
        assert relative_difference(found, reference) < 1e-5


def test_gradient_does_not_depend_on_the_head_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(20, seed=2)
    policy = Policy.of(tiny_model("llama", tied=False), Learner())
    _, reference = gradient(policy, rows, Dppo(), 10_000)
    for tokens in (1, 3, 50):
        monkeypatch.setattr(head, "chunk_rows", lambda *_, rows=tokens: rows)
        _, found = gradient(policy, rows, Dppo(), 10_000)
        assert relative_difference(found, reference) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("way", "dtype", "tolerance"), [("flex", "float32", 1e-4), ("flex", "bfloat16", 0.2), ("varlen", "bfloat16", 0.2)]
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_gradients_on_a_gpu_are_those_of_one_by_one_training_in_float32(
    family: Family, way: str, dtype: str, tolerance: float
) -> None:
    rows = random_rows(40, seed=6)
    loss, expected = reference_gradient(tiny_model(family, head_width=GPU_HEAD_WIDTH), rows, Tis())
    learner = Learner.model_validate({"device": "cuda", "attention": way, "dtype": dtype})
    policy = Policy.of(tiny_model(family, head_width=GPU_HEAD_WIDTH), learner)
    found_loss, found = gradient(policy, rows, Tis(), 200)
    assert found_loss == pytest.approx(loss, rel=tolerance, abs=tolerance)
    assert relative_difference(found, expected) < tolerance


def test_temperature_of_each_role_scales_the_logits() -> None:
    cold, warm = sample([1, 2, 3, 4], [2, 3]), sample([1, 2, 3, 4], [2, 3], seed=1)
    rows = [cold, Sample(**{name: getattr(warm, name) for name in warm.__slots__} | {"temperature": 2.5})]
    _, expected = reference_gradient(tiny_model("llama"), rows, Tis())
    _, found = gradient(Policy.of(tiny_model("llama"), Learner()), rows, Tis(), 100)
    assert relative_difference(found, expected) < 1e-5


def test_shared_prefixes_are_computed_once() -> None:
    (batch,) = pack([sample([1, 2, 3, 4], [3]), sample([1, 2, 3, 5, 6], [3, 4]), sample([1, 2, 3], [2])],
                    limit_tokens=100, device=CPU)  # fmt: skip
    assert batch.tokens_N.tolist() == [1, 2, 3, 5]
    assert batch.positions_N.tolist() == [0, 1, 2, 3]
    # (after 1 2: 3), (after 1 2 3: 4 and 5), (after 1 2 3 5: 6)
    assert list(zip(batch.predictor_K.tolist(), batch.target_K.tolist(), strict=True)) == [
        (1, 3),
        (2, 4),
        (2, 5),
        (3, 6),
    ]
    assert batch.packed.tokens == 3 + 4 + 2


def test_the_same_sampled_token_in_two_trees_is_scored_once_and_weighed_twice() -> None:
    (batch,) = pack([sample([1, 2, 3], [2]), sample([1, 2, 3], [2], seed=1)], limit_tokens=100, device=CPU)
    assert batch.target_K.tolist() == [3]
    assert batch.scored_T.tolist() == [0, 0]
    assert len(set(batch.advantage_T.tolist())) == 2


def test_micro_batches_hold_at_most_the_tokens_asked_for() -> None:
    batches = pack(random_rows(40, seed=3), limit_tokens=64, device=CPU)
    assert len(batches) > 5
    assert max(len(batch.tokens_N) for batch in batches) <= 64


def test_a_trajectory_that_samples_its_first_token_is_refused() -> None:
    with pytest.raises(ValueError, match="planner trajectory of 3 tokens must sample some, and not its first"):
        sample([1, 2, 3], [0, 1])
