"""Credit that judges whole trees, worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matpo.config import Learner
from matpo.credit.baselines import EPSILON, Baseline, compared
from matpo.credit.broadcast import Broadcast
from matpo.credit.leave_one_out import LeaveOneOut
from matpo.credit.orchestrator_only import OrchestratorOnly
from matpo.credit.role_baseline import RoleBaseline
from matpo.credit.role_group import RoleGroup, Row
from matpo.credit.scheme import NOTHING, Scheme
from protocols.records import EpisodeGroup
from tests.matpo.trees import OTHER, TASK, group, group_of, trajectory, tree

HALF_STD = math.sqrt(0.5) + EPSILON
"""Of the rewards 1 and 0."""


def planner_with_two_workers_and_one_alone() -> EpisodeGroup:
    """Reward 1: a planner of two turns and two workers of one; reward 0: a planner of one turn and one worker."""
    good = tree(
        1.0,
        trajectory(".x.x"),
        trajectory(".x", role="worker", parent=(0, 1)),
        trajectory(".x", role="worker", parent=(0, 1)),
    )
    bad = tree(0.0, trajectory(".x"), trajectory(".x", role="worker", parent=(0, 1)), name="t1")
    return group_of([good, bad])


def test_broadcast_divides_the_centred_reward_by_the_standard_deviation_of_the_group() -> None:
    # mean 0.5, unbiased variance (4 · 0.25) / 3
    scale = math.sqrt(1 / 3) + 1e-6
    found = Broadcast().credit(group(1.0, 0.0, 1.0, 0.0), NOTHING)
    assert [score for (score,) in found] == pytest.approx([0.5 / scale, -0.5 / scale, 0.5 / scale, -0.5 / scale])


def test_broadcast_without_the_division_only_centres() -> None:
    found = Broadcast(normalise_by_std=False).credit(group(1.0, 0.0, 0.5), NOTHING)
    assert [score for (score,) in found] == pytest.approx([0.5, -0.5, 0.0])


def test_leave_one_out_compares_with_the_mean_of_the_others() -> None:
    found = LeaveOneOut().credit(group(1.0, 0.0, 0.5), NOTHING)
    assert [score for (score,) in found] == pytest.approx([1 - 0.25, 0 - 0.75, 0.5 - 0.5])


def test_an_unscored_tree_has_no_advantage_and_no_part_in_the_baseline() -> None:
    assert Broadcast(normalise_by_std=False).credit(group(1.0, None, 0.0), NOTHING) == ((0.5,), (None,), (-0.5,))
    assert LeaveOneOut().credit(group(1.0, None, 0.0), NOTHING) == ((1.0,), (None,), (-1.0,))
    assert RoleGroup().credit(group(1.0, None, 0.0), NOTHING)[1] == (None,)
    assert RoleBaseline().credit(group(1.0, None, 0.0), NOTHING) == ((1.0,), (None,), (0.0,))


@pytest.mark.parametrize("scheme", [Broadcast(), LeaveOneOut(), RoleGroup(), OrchestratorOnly()])
def test_a_lone_scored_tree_has_no_baseline_and_so_no_advantage(scheme: Scheme) -> None:
    assert scheme.credit(group(1.0, None), NOTHING) == ((None,), (None,))


@pytest.mark.parametrize("scheme", [Broadcast(), LeaveOneOut(), RoleGroup(), OrchestratorOnly()])
def test_equal_rewards_give_advantage_zero_which_is_not_unscored(scheme: Scheme) -> None:
    found = scheme.credit(group(0.1, 0.1, 0.1), NOTHING)
    assert [score for (score,) in found] == pytest.approx([0.0, 0.0, 0.0], abs=1e-9)


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=2, max_size=16), st.booleans())
def test_advantages_of_scored_values_sum_to_zero(rewards: list[float | None], by_std: bool) -> None:
    both: tuple[Baseline, Baseline] = ("mean", "others")
    for baseline in both:
        found = compared(rewards, baseline=baseline, normalise_by_std=by_std)
        assert sum(a for a in found if a is not None) == pytest.approx(0, abs=1e-6)
        if sum(r is not None for r in rewards) >= 2:
            assert [a is None for a in found] == [r is None for r in rewards]


def test_values_may_be_compared_with_the_largest_or_with_nothing() -> None:
    assert compared((1.0, None, 3.0), baseline="max", normalise_by_std=False) == (-2.0, None, 0.0)
    assert compared((1.0, None), baseline="none", normalise_by_std=False) == (1.0, None)


@pytest.mark.parametrize("credit", ["broadcast", "leave_one_out"])
def test_the_scalar_of_a_tree_goes_to_its_planner_and_every_worker(credit: str) -> None:
    options = {"normalise_by_std": False} if credit == "broadcast" else {}
    scheme = Learner.model_validate({"credit": {"name": credit, **options}}).credit
    half = 0.5 if credit == "broadcast" else 1.0
    assert scheme.credit(planner_with_two_workers_and_one_alone(), NOTHING) == ((half,) * 3, (-half,) * 2)


def test_an_orchestrator_alone_is_credited_and_its_workers_are_not_scored() -> None:
    good, bad = OrchestratorOnly().credit(planner_with_two_workers_and_one_alone(), NOTHING)
    assert good == pytest.approx((0.5 / HALF_STD, None, None))
    assert bad == pytest.approx((-0.5 / HALF_STD, None))
    good, _ = OrchestratorOnly(role="worker", normalise_by_std=False).credit(
        planner_with_two_workers_and_one_alone(), NOTHING
    )
    assert good == (None, 0.5, 0.5)


@pytest.mark.parametrize("row", ["turn", "trajectory", "tree"])
def test_a_role_is_compared_with_itself_over_its_turns_its_trajectories_or_its_trees(row: Row) -> None:
    good, bad = RoleGroup(row=row).credit(planner_with_two_workers_and_one_alone(), NOTHING)
    # Rewards 1, 1, 0: mean 2/3, variance (1/9 + 1/9 + 4/9) / 2 = 1/3. Rewards 1, 0: mean 1/2, variance 1/2.
    thrice, twice = math.sqrt(1 / 3) + EPSILON, HALF_STD
    often, seldom = (1 / 3 / thrice, -2 / 3 / thrice), (0.5 / twice, -0.5 / twice)
    planner = often if row == "turn" else seldom
    worker = seldom if row == "tree" else often
    assert good == pytest.approx((planner[0], worker[0], worker[0]))
    assert bad == pytest.approx((planner[1], worker[1]))


def test_a_role_that_took_part_in_one_tree_alone_is_not_scored() -> None:
    called = tree(1.0, trajectory(".x"), *(trajectory(".x", role="worker", parent=(0, 1)) for _ in range(2)))
    good, _ = RoleGroup().credit(group_of([called, tree(0.0, name="t1")]), NOTHING)
    assert good[1:] == (None, None)


def test_a_role_is_measured_against_its_running_mean_which_moves_after_use() -> None:
    scheme, memory = RoleBaseline(decay=0.9), {"planner": 0.5}
    trees = planner_with_two_workers_and_one_alone()
    assert scheme.credit(trees, memory) == ((0.5, 1.0, 1.0), (-0.5, 0.0))
    # 0.9 · 0.5 + 0.1 · 1 = 0.55, then 0.9 · 0.55 + 0.1 · 0; a tree counts once however many workers it has.
    assert scheme.remember(memory, [trees]) == pytest.approx({"planner": 0.495, "worker": 0.09})
    assert memory == {"planner": 0.5}


def test_a_scheme_without_memory_hands_on_what_it_was_given() -> None:
    assert Broadcast().remember({"planner": 0.25}, [group(1.0, 0.0)]) == {"planner": 0.25}


def test_a_group_of_two_tasks_is_refused() -> None:
    with pytest.raises(ValueError, match="group g0"):
        EpisodeGroup("g0", TASK, (tree(1.0), tree(0.0, name="t1", task=OTHER)))


def test_the_config_chooses_the_scheme_by_name_alone_by_options_alone_or_by_both() -> None:
    for given_credit, chosen in [
        ("leave_one_out", LeaveOneOut()),
        ({"normalise_by_std": False}, Broadcast(normalise_by_std=False)),
        ({"name": "role_group", "row": "tree"}, RoleGroup(row="tree")),
    ]:
        assert Learner.model_validate({"credit": given_credit}).credit == chosen
