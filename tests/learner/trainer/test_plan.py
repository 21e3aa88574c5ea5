"""Micro-batches: what they cost, where the walk through the trie is cut, and how ranks share them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.trainer.costs import ModelShape, Work, packed_work, padded_work
from learner.trainer.model import Policy
from learner.trainer.pack import micro_batch, pack
from learner.trainer.plan import MICRO_BATCH_TOKENS, MicroBatches, Sample, plan
from learner.trainer.report import work_report
from learner.trainer.step import accumulate
from matpo.config import Dppo, Learner, Lora
from tests.learner.trainer.models import sample, tiny_model

CPU = torch.device("cpu")
SHAPE = ModelShape(body_parameters=1000, trained_parameters=1000, layers=2, attention_width=8, hidden=8, vocabulary=10)


def rows(*sequences: Sequence[int]) -> list[Sample]:
    """Samples whose last token was drawn, so that all before it are inputs."""
    return [sample(tokens, [len(tokens) - 1], seed=number) for number, tokens in enumerate(sequences)]


def names(planned: MicroBatches, given: list[Sample]) -> list[list[int]]:
    return [sorted(given.index(one) for one in together) for together in planned]


def computed(planned: MicroBatches) -> list[Work]:
    return [micro_batch(together, CPU).computed for together in planned]


def test_flops_of_a_step_are_those_of_its_three_kinds_of_product() -> None:
    # 6·1000 a token, 12·8·2 a pair, 6·10·8 a scored token
    assert SHAPE.flops(Work(tokens=3, pairs=6, scored=2)) == 3 * 6000 + 6 * 192 + 2 * 480


def test_a_frozen_matrix_costs_no_gradient() -> None:
    frozen = replace(SHAPE, trained_parameters=100, head_trained=False)
    # 4·1000 + 2·100 a token, 4·10·8 a scored one
    assert frozen.flops(Work(tokens=3, pairs=6, scored=2)) == 3 * 4200 + 6 * 192 + 2 * 320


def test_work_of_sequences_alone_and_of_padded_ones_is_counted_by_hand() -> None:
    assert packed_work([3, 2], scored=4) == Work(tokens=5, pairs=6 + 3, scored=4)
    # eight rows of 4 tokens, then one of 2
    assert padded_work(np.array([4, 1, 1, 1, 1, 1, 1, 1, 2]), scored=9) == Work(34, 8 * 10 + 3, 9)


def test_a_micro_batch_knows_what_it_computes_and_what_sharing_saved() -> None:
    batch = micro_batch(rows([1, 2, 3, 4], [1, 2, 5, 6, 7]), CPU)
    assert batch.computed == Work(tokens=5, pairs=1 + 2 + 3 + 3 + 4, scored=2)
    assert batch.packed == Work(tokens=3 + 4, pairs=6 + 10, scored=2)
    assert batch.padded == Work(tokens=2 * 4, pairs=2 * 10, scored=2)


def test_the_walk_is_cut_between_two_tasks_although_more_would_fit() -> None:
    one = [[1, 1, 1, 1, 1, 1, 2, 3], [1, 1, 1, 1, 1, 1, 3, 3], [1, 1, 1, 1, 1, 1, 4, 3]]
    other = [[2, 2, 2, 2, 2, 2, 2, 3], [2, 2, 2, 2, 2, 2, 3, 3]]
    mixed = rows(one[0], other[0], one[1], other[1], one[2])
    # 9 distinct inputs of the first task, 8 of the other; 16 tokens would hold the first and a part of the other.
    (planned,) = plan(mixed, limit_tokens=16, shape=SHAPE)
    assert sorted(names(planned, mixed)) == [[0, 2, 4], [1, 3]]
    assert sorted(work.tokens for work in computed(planned)) == [8, 9]


def test_a_deep_cut_is_taken_when_a_task_does_not_fit_and_recomputes_its_prefix() -> None:
    mixed = rows([1, 1, 1, 1, 2, 3], [1, 1, 1, 1, 3, 3], [1, 1, 1, 1, 4, 3], [1, 1, 2, 2, 2, 2, 3])
    # distinct inputs: 7 in the first three, 2 shared with the last one, which adds 4
    (planned,) = plan(mixed, limit_tokens=8, shape=SHAPE)
    assert sorted(names(planned, mixed)) == [[0, 1, 2], [3]]


def test_a_sequence_longer_than_the_limit_is_alone() -> None:
    long = rows([1] * 30, [2, 2], [2, 3])
    (planned,) = plan(long, limit_tokens=4, shape=SHAPE)
    assert sorted(names(planned, long)) == [[0], [1, 2]]


def test_a_rank_without_samples_takes_part_with_a_token_that_is_not_scored() -> None:
    planned = plan(rows([1, 2], [3, 2]), limit_tokens=100, shape=SHAPE, ranks=3)
    assert sorted(len(together) for rank in planned for together in rank) == [0, 1, 1]
    batch = micro_batch((), CPU)
    policy = Policy.of(tiny_model("qwen3"), Learner())
    done = accumulate(policy, [batch], Dppo())
    assert done.loss == 0.0
    assert batch.roles == ()
    assert all(not p.grad.any() for p in policy.parameters.values() if p.grad is not None)


def test_a_step_without_samples_has_no_micro_batches() -> None:
    assert plan([], limit_tokens=100, shape=SHAPE, ranks=2) == ((), ())


@st.composite
def some_rows(draw: st.DrawFn) -> list[Sample]:
    return rows(*draw(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=12), min_size=1, max_size=14)))


@settings(max_examples=60, deadline=None)
@given(given_rows=some_rows(), ranks=st.integers(1, 4), limit=st.sampled_from([1, 9, 25, 1000]))
def test_every_sample_is_planned_once_within_the_limit_and_ranks_keep_step(
    given_rows: list[Sample], ranks: int, limit: int
) -> None:
    planned = plan(given_rows, limit_tokens=limit, shape=SHAPE, ranks=ranks)
    assert len(planned) == ranks
    assert len({len(rank) for rank in planned}) == 1
    places = [given_rows.index(one) for rank in planned for together in rank for one in together]
    assert sorted(places) == list(range(len(given_rows)))
    for rank in planned:
        for together in rank:
            assert len(together) <= 1 or micro_batch(together, CPU).computed.tokens <= limit
    sizes = {len(together) for rank in planned for together in rank}
    assert min(sizes) > 0 or max(sizes) <= 1


def brute_force(walk: list[Sample], limit: int) -> float:
    """Least cost of cutting a sorted walk into pieces, over all ways to cut it."""

    def cost(pieces: list[list[Sample]]) -> float:
        works = [micro_batch(piece, CPU).computed for piece in pieces]
        if any(work.tokens > limit and len(piece) > 1 for work, piece in zip(works, pieces, strict=True)):
            return float("inf")
        return sum(SHAPE.flops(work + Work(tokens=MICRO_BATCH_TOKENS)) for work in works)

    best = float("inf")
    for cuts in range(1 << (len(walk) - 1)):
        bounds = [0, *(place + 1 for place in range(len(walk) - 1) if cuts >> place & 1), len(walk)]
        best = min(best, cost([walk[start:end] for start, end in pairwise(bounds)]))
    return best


@settings(max_examples=20, deadline=None)
@given(
    sequences=st.lists(st.lists(st.integers(0, 1), min_size=3, max_size=9), min_size=1, max_size=7, unique_by=tuple),
    limit=st.sampled_from([8, 14, 20]),
)
def test_one_rank_gets_the_cheapest_way_to_cut_the_walk(sequences: list[list[int]], limit: int) -> None:
    # Distinct last tokens: nothing is scored twice, so the plan's costs are exact.
    given_rows = rows(*([*tokens, number + 2] for number, tokens in enumerate(sequences)))
    walk = sorted(given_rows, key=lambda one: one.inputs.tolist())
    (planned,) = plan(given_rows, limit_tokens=limit, shape=SHAPE)
    found = sum(SHAPE.flops(work + Work(tokens=MICRO_BATCH_TOKENS)) for work in computed(planned))
    assert found == pytest.approx(brute_force(walk, limit), rel=1e-9)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_finish_together(ranks: int) -> None:
    rng = np.random.default_rng(0)
    tasks = [rng.integers(0, 50, 60).tolist() for _ in range(12)]
    given_rows = rows(
        *(tasks[number % 12] + rng.integers(0, 50, int(rng.integers(5, 120))).tolist() for number in range(96))
    )
    planned = plan(given_rows, limit_tokens=1200, shape=SHAPE, ranks=ranks)
    costs = [[SHAPE.flops(work) for work in computed(rank)] for rank in planned]
    waited = sum(max(together) for together in zip(*costs, strict=True))
    assert sum(map(sum, costs)) / ranks / waited > 0.9
    (alone,) = plan(given_rows, limit_tokens=1200, shape=SHAPE)
    assert sum(map(sum, costs)) < 1.15 * sum(SHAPE.flops(work) for work in computed(alone))


def test_a_model_tells_its_own_shape() -> None:
    shape = Policy.of(tiny_model("qwen3", tied=False), Learner()).shape
    attention = 16 * 32 + 2 * 16 * 16 + 32 * 16  # q, k and v, o
    body = 2 * (attention + 3 * 16 * 24)
    assert shape == ModelShape(
        body_parameters=body, trained_parameters=body, layers=2, attention_width=32, hidden=16, vocabulary=13
    )
    assert Policy.of(tiny_model("llama"), Learner()).shape == shape
    lora = Lora(rank=3, target_modules=("q_proj", "down_proj"))
    adapted = Policy.of(tiny_model("llama"), Learner(), lora).shape
    factors = 2 * 3 * ((16 + 32) + (24 + 16))  # A and B of q and of down, in two layers
    assert (adapted.body_parameters, adapted.trained_parameters) == (body + factors, factors)
    assert not adapted.head_trained
    several = lora.model_copy(update={"roles": {"planner": "own", "worker": "own"}})
    assert Policy.of(tiny_model("llama"), Learner(), several).shape == adapted  # a token meets its own alone


def test_what_is_not_shared_is_counted_as_it_is_computed() -> None:
    # Inputs [1 2 3] and [1 2 5 6]: lengths alike, so both are rows of four.
    batch = micro_batch(rows([1, 2, 3, 4], [1, 2, 5, 6, 7]), CPU)
    shared, packed = (
        Policy.of(tiny_model("llama"), Learner.model_validate({"attention": way})) for way in ("auto", "packed")
    )
    assert shared.work(batch) == Work(tokens=5, pairs=1 + 2 + 3 + 3 + 4, scored=2)
    assert packed.work(batch) == Work(tokens=2 * 4, pairs=2 * 10, scored=2)
    report = work_report([batch], packed)
    assert (report.unique_tokens, report.computed_tokens) == (5, 8)
    assert report.flops == packed.shape.flops(Work(8, 20, 2)) > report.packed_flops


def test_gradients_of_all_ranks_add_up_to_those_of_one() -> None:
    given_rows = rows(*([number % 3, *range(number % 5 + 1), number % 7, 5] for number in range(12)))
    policy = Policy.of(tiny_model("llama"), Learner())

    def gradient(ranks: int, rank: int) -> torch.Tensor:
        batches = pack(given_rows, limit_tokens=20, device=CPU, shape=policy.shape, ranks=ranks, rank=rank)
        accumulate(policy, batches, Dppo())
        return torch.cat([p.grad.flatten() for p in policy.parameters.values() if p.grad is not None])

    whole, parts = gradient(1, 0), torch.stack([gradient(3, rank) for rank in range(3)]).sum(0)
    assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-6 * float(whole.abs().max()))
