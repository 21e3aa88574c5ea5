"""Token weights of a step, worked out by hand for two trees.

Tree a: planner with 2 sampled tokens, workers with 1 and 3. Tree b: planner with 4.
"""

from __future__ import annotations

import pytest

from matpo.config import Learner
from matpo.weighting import TreeWeights, token_weights
from protocols.records import Status
from tests.matpo.trees import trajectory, tree

A = tree(
    1.0,
    trajectory("..xx"),
    trajectory(".x", role="worker", parent=(0, 0)),
    trajectory(".xxx", role="worker", parent=(0, 0)),
    name="a",
)
B = tree(0.0, trajectory(".xxxx"), name="b")
SCORED = ((0.5, 0.5, 0.5), (-0.5,))


def same(found: tuple[TreeWeights, ...], *expected: TreeWeights) -> bool:
    """Equal up to rounding."""
    return [len(row) for row in found] == [len(row) for row in expected] and all(
        one == pytest.approx(other) for one, other in zip(found, expected, strict=True)
    )


def learner(mode: str, **more: object) -> Learner:
    return Learner.model_validate({"weighting": mode, **more})


def test_tree_mode_gives_each_tree_half_spread_over_its_tokens() -> None:
    weights = token_weights([A, B], SCORED, learner("tree"))
    assert same(weights, (1 / 12, 1 / 12, 1 / 12), (1 / 8,))
    assert 2 / 12 + 1 / 12 + 3 / 12 == pytest.approx(4 / 8) == pytest.approx(0.5)


def test_token_mode_gives_every_token_of_the_step_the_same() -> None:
    assert same(token_weights([A, B], SCORED, learner("token")), (0.1, 0.1, 0.1), (0.1,))


def test_trajectory_mode_gives_each_of_four_trajectories_a_quarter() -> None:
    weights = token_weights([A, B], SCORED, learner("trajectory"))
    assert same(weights, (1 / 8, 1 / 4, 1 / 12), (1 / 16,))


def test_constant_mode_divides_by_the_number_of_trees_and_a_fixed_length() -> None:
    weights = token_weights([A, B], SCORED, learner("constant", constant_tokens=100))
    assert same(weights, (1 / 200, 1 / 200, 1 / 200), (1 / 200,))


@pytest.mark.parametrize("mode", ["tree", "token", "trajectory"])
def test_weights_of_all_sampled_tokens_sum_to_one(mode: str) -> None:
    weights = token_weights([A, B], SCORED, learner(mode))
    total = sum(
        weight * len(trajectory.versions)
        for tree, row in zip([A, B], weights, strict=True)
        for trajectory, weight in zip(tree.trajectories, row, strict=True)
    )
    assert total == pytest.approx(1.0)


def test_a_trajectory_that_infrastructure_ended_is_masked_and_leaves_the_denominators() -> None:
    broken = tree(
        1.0,
        trajectory("..xx"),
        trajectory(".xxx", role="worker", parent=(0, 0), status="tool_failure"),
        name="a",
    )
    weights = token_weights([broken, B], ((0.5, 0.5), (-0.5,)), learner("tree"))
    assert same(weights, (1 / 4, 0.0), (1 / 8,))


@pytest.mark.parametrize("status", ["tool_failure", "engine_failure", "cancelled"])
def test_every_infrastructure_status_masks(status: Status) -> None:
    lost = tree(1.0, trajectory(".x", status=status))
    assert token_weights([lost], ((0.5,),), learner("token")) == ((0.0,),)


def test_reaching_a_limit_is_the_policys_own_doing_and_counts() -> None:
    long = tree(0.0, trajectory(".x", status="turn_limit"))
    assert token_weights([long], ((-0.5,),), learner("token")) == ((1.0,),)


def test_an_unscored_tree_weighs_nothing_and_is_not_counted() -> None:
    weights = token_weights([A, B], ((None, None, None), (-0.5,)), learner("tree"))
    assert same(weights, (0.0, 0.0, 0.0), (1 / 4,))


def test_role_factors_multiply_and_enter_no_denominator() -> None:
    weights = token_weights([A, B], SCORED, learner("tree", role_factors={"worker": 0.5, "planner": 2.0}))
    assert same(weights, (2 / 12, 0.5 / 12, 0.5 / 12), (2 / 8,))


def test_a_step_without_anything_to_train_has_only_zero_weights() -> None:
    assert token_weights([A], ((None, None, None),), learner("tree")) == ((0.0, 0.0, 0.0),)
