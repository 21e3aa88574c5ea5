"""Advantages, worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matpo.config import Learner
from matpo.credit.broadcast import broadcast
from matpo.credit.chosen import advantages
from matpo.credit.leave_one_out import leave_one_out
from protocols.records import EpisodeGroup
from tests.matpo.trees import OTHER, TASK, group, group_of, trajectory, tree


def test_broadcast_divides_the_centred_reward_by_the_standard_deviation_of_the_group() -> None:
    # mean 0.5, unbiased variance (4 · 0.25) / 3
    scale = math.sqrt(1 / 3) + 1e-6
    assert broadcast((1.0, 0.0, 1.0, 0.0), normalise_by_std=True) == pytest.approx(
        (0.5 / scale, -0.5 / scale, 0.5 / scale, -0.5 / scale)
    )


def test_broadcast_without_the_division_only_centres() -> None:
    assert broadcast((1.0, 0.0, 0.5), normalise_by_std=False) == pytest.approx((0.5, -0.5, 0.0))


def test_leave_one_out_compares_with_the_mean_of_the_others() -> None:
    assert leave_one_out((1.0, 0.0, 0.5)) == pytest.approx((1 - 0.25, 0 - 0.75, 0.5 - 0.5))


def test_an_unscored_tree_has_no_advantage_and_no_part_in_the_baseline() -> None:
    assert broadcast((1.0, None, 0.0), normalise_by_std=False) == (0.5, None, -0.5)
    assert leave_one_out((1.0, None, 0.0)) == (1.0, None, -1.0)


def test_a_lone_scored_tree_has_no_baseline_and_so_no_advantage() -> None:
    assert broadcast((1.0, None), normalise_by_std=True) == (None, None)
    assert leave_one_out((None, 0.0)) == (None, None)


def test_equal_rewards_give_advantage_zero_which_is_not_unscored() -> None:
    assert broadcast((0.1, 0.1, 0.1), normalise_by_std=True) == pytest.approx((0.0, 0.0, 0.0), abs=1e-9)


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=2, max_size=16))
def test_advantages_of_scored_trees_sum_to_zero(rewards: list[float | None]) -> None:
    for found in (broadcast(tuple(rewards), normalise_by_std=True), leave_one_out(tuple(rewards))):
        assert sum(a for a in found if a is not None) == pytest.approx(0, abs=1e-6)
        if sum(r is not None for r in rewards) >= 2:
            assert [a is None for a in found] == [r is None for r in rewards]


@pytest.mark.parametrize("credit", ["broadcast", "leave_one_out"])
def test_the_scalar_of_a_tree_goes_to_its_planner_and_every_worker(credit: str) -> None:
    good = tree(
        1.0,
        trajectory("..xx"),
        trajectory(".x", role="worker", parent=(0, 0)),
        trajectory(".xxx", role="worker", parent=(0, 0)),
    )
    bad = tree(0.0, trajectory("..x"), name="t1")
    learner = Learner.model_validate({"credit": credit, "normalise_by_std": False})
    first, second = advantages(group_of([good, bad]), learner)
    half = 0.5 if credit == "broadcast" else 1.0
    assert first == (half, half, half)
    assert second == (-half,)


def test_a_group_of_two_tasks_is_refused() -> None:
    with pytest.raises(ValueError, match="group g0"):
        EpisodeGroup("g0", TASK, (tree(1.0), tree(0.0, name="t1", task=OTHER)))


def test_the_config_chooses_the_scheme() -> None:
    assert advantages(group(1.0, 0.0, 0.5), Learner(credit="leave_one_out"))[0] == (0.75,)
    assert advantages(group(1.0, 0.0, 0.5), Learner(normalise_by_std=False))[0] == (0.5,)
