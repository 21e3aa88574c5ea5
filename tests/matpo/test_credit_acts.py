"""Credit that looks inside trees, worked out by hand: workers with rewards of their own, and branches."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from matpo.config import Learner
from matpo.credit.baselines import EPSILON
from matpo.credit.counterfactual import Counterfactual
from matpo.credit.hierarchical import Hierarchical
from matpo.credit.multiplier import Multiplier
from matpo.credit.node_local import NodeLocal
from matpo.credit.scheme import NOTHING, GroupAdvantages
from matpo.credit.tree_backup import TreeBackup
from matpo.weighting import token_weights
from protocols.records import EpisodeGroup, EpisodeTree, Replay, Trajectory
from tests.matpo.trees import group_of, trajectory, tree


def worker(caller: int = 0) -> Trajectory:
    return trajectory(".x", role="worker", parent=(caller, 1))


def with_worker_rewards() -> EpisodeGroup:
    """Total 1 with workers at 0.8 and 0.2, total 0 with a worker at 0.5; nobody scores the planner by itself."""
    good = tree(1.0, trajectory(".x"), worker(), worker(), earned=(None, 0.8, 0.2))
    bad = tree(0.0, trajectory(".x"), worker(), earned=(None, 0.5), name="t1")
    return group_of([good, bad])


def rounded(found: GroupAdvantages) -> GroupAdvantages:
    return tuple(tuple(None if score is None else round(score, 9) for score in tree) for tree in found)


def test_workers_are_compared_under_their_caller_and_callers_with_one_another() -> None:
    assert rounded(Hierarchical().credit(with_worker_rewards(), NOTHING)) == rounded(((0.5, 0.3, -0.3), (-0.5, None)))
    by_std = Hierarchical(normalise_by_std=True).credit(with_worker_rewards(), NOTHING)
    scale = math.sqrt(0.18) + EPSILON  # (0.3² + 0.3²) / 1
    assert by_std[0][1:] == pytest.approx((0.3 / scale, -0.3 / scale))


def test_a_worker_nobody_scored_takes_no_part_in_the_comparison_of_its_siblings() -> None:
    good = tree(1.0, trajectory(".x"), worker(), worker(), worker(), earned=(None, 0.8, None, 0.2))
    found = Hierarchical().credit(group_of([good, tree(0.0, name="t1")]), NOTHING)
    assert rounded(found) == rounded(((0.5, 0.3, None, -0.3), (-0.5,)))


def test_workers_of_different_callers_are_not_compared() -> None:
    chain = tree(1.0, trajectory(".x"), worker(), worker(caller=1), earned=(None, 0.8, 0.2))
    found = Hierarchical().credit(group_of([chain, tree(0.0, name="t1")]), NOTHING)
    assert found == ((0.5, None, None), (-0.5,))


def test_a_node_answers_for_itself_and_a_share_of_its_workers_against_the_other_roots() -> None:
    # Roots: 1 + 0.4 · 0.5 = 1.2 and 0 + 0.4 · 0.5 = 0.2; each act against the other tree's root.
    found = NodeLocal(level_depths=False).credit(with_worker_rewards(), NOTHING)
    assert rounded(found) == rounded(((1.0, 0.6, 0.0), (-1.0, -0.7)))
    # Two acts at depth 0 and three at depth 1: the mean is 2.5, so 2.5 / 2 and 2.5 / 3.
    levelled = NodeLocal().credit(with_worker_rewards(), NOTHING)
    assert rounded(levelled) == rounded(((1.25, 0.5, 0.0), (-1.25, -0.7 * 2.5 / 3)))


def test_a_node_answers_for_its_own_workers_not_for_theirs() -> None:
    chain = tree(1.0, trajectory(".x"), worker(), worker(caller=1), earned=(None, 0.5, 1.0))
    found = NodeLocal(child_share=0.5, level_depths=False).credit(group_of([chain, tree(0.0, name="t1")]), NOTHING)
    # root 1 + 0.5 · 0.5, worker 0.5 + 0.5 · 1, its worker 1; the other root is 0
    assert rounded(found) == rounded(((1.25, 1.0, 1.0), (-1.25,)))


def test_an_unscored_root_is_no_baseline_and_an_unscored_worker_no_zero() -> None:
    broken = replace(with_worker_rewards().trees[1], rewards={"total": None})
    found = NodeLocal(level_depths=False).credit(group_of([with_worker_rewards().trees[0], broken]), NOTHING)
    # nothing to compare the first tree with; the broken tree's worker still has the first root, 1.2
    assert rounded(found) == rounded(((None, None, None), (None, -0.7)))


def test_own_rewards_are_raised_where_the_tree_is_right_and_lowered_where_it_is_not() -> None:
    values = [0.8 * 1.2, 0.2 * 1.2, 0.5 * 0.8]
    mean = sum(values) / 3
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / 2) + EPSILON
    first, second, third = ((v - mean) / std for v in values)
    roots = math.sqrt((0.6**2 + 0.6**2) / 1) + EPSILON  # 1 · 1.2 and 0 · 0.8, mean 0.6
    found = Multiplier().credit(with_worker_rewards(), NOTHING)
    assert rounded(found) == rounded(((0.6 / roots, first, second), (-0.6 / roots, third)))


def act(role: str, parent: int | None = None) -> Trajectory:
    return trajectory(".x", role=role, parent=None if parent is None else (parent, 1))


def branched() -> EpisodeTree:
    """Two generators, two verifiers each, two refiners each; those of the first earn 1, 0 and 1, 1, of the second 0."""
    acts = [act("generator"), act("verifier", 0), act("verifier", 0), *(act("refiner", 1 + n // 2) for n in range(4))]
    acts += [act("generator"), act("verifier", 7), act("verifier", 7), *(act("refiner", 8 + n // 2) for n in range(4))]
    earned = (None, None, None, 1.0, 0.0, 1.0, 1.0, None, None, None, 0.0, 0.0, 0.0, 0.0)
    return tree(0.375, *acts, earned=earned)


def test_an_act_is_worth_the_mean_below_it_against_its_alternatives() -> None:
    # V(verifiers) = 0.5, 1, 0, 0; V(generators) = 0.75, 0, whose mean is 0.375
    (found,) = TreeBackup().credit(EpisodeGroup("g0", branched().task, (branched(),)), NOTHING)
    first = (0.375, -0.25, 0.25, 0.5, -0.5, 0.0, 0.0)
    assert found == pytest.approx((*first, -0.375, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))


def test_acts_from_the_task_alone_are_compared_over_all_trees_of_the_group() -> None:
    second = tree(1.0, act("generator"), act("verifier", 0), act("refiner", 1), earned=(None, None, 1.0), name="t1")
    found = TreeBackup().credit(group_of([branched(), second]), NOTHING)
    mean = (0.75 + 0.0 + 1.0) / 3
    assert (found[0][0], found[0][7], found[1][0]) == pytest.approx((0.75 - mean, -mean, 1.0 - mean))
    assert found[1][1:] == (None, None)  # no alternatives there


def test_with_a_threshold_values_become_labels() -> None:
    (found,) = TreeBackup(label_above=0.5).credit(EpisodeGroup("g0", branched().task, (branched(),)), NOTHING)
    assert found == (1, -1, 1, 1, -1, 1, 1, *(-1,) * 7)


def test_a_counterfactual_compares_an_alternative_with_the_mean_of_the_others() -> None:
    (found,) = Counterfactual().credit(EpisodeGroup("g0", branched().task, (branched(),)), NOTHING)
    assert found[:7] == pytest.approx((0.75, -0.5, 0.5, 1.0, -1.0, 0.0, 0.0))
    assert found[7] == pytest.approx(-0.75)


def replayed(*rewards: tuple[float | None, ...]) -> EpisodeTree:
    """A planner of so many messages, and for each of them alternatives that led to these totals, every one followed by
    the rest of its episode."""
    acts, replays = [trajectory("." + "x." * len(rewards))], []
    for decision, totals in enumerate(rewards):
        for total in totals:
            replays.append(Replay(trajectory=0, turn=2 * decision + 1, alternative=len(acts), reward=total))
            acts += [trajectory("." * (2 * decision + 1) + "x", parent=(0, 2 * decision)), trajectory("..x")]
    return tree(0.5, *acts, replays=tuple(replays))


def test_where_episodes_were_replayed_the_alternatives_of_a_decision_are_compared_and_nothing_else() -> None:
    # Decision 1: 1 - (0 + 0.5)/2, 0 - (1 + 0.5)/2, 0.5 - (1 + 0)/2. Decision 2: 0 - 1, 1 - 0.5, 1 - 0.5.
    one = replayed((1.0, 0.0, 0.5), (0.0, 1.0, 1.0))
    other = replace(replayed((1.0, 1.0, 0.0)), tree_id="t1")
    first, second = Counterfactual().credit(group_of([one, other]), NOTHING)
    assert first == (None, 0.75, None, -0.75, None, 0.0, None, -1.0, None, 0.5, None, 0.5, None)
    assert second == (None, 0.5, None, 0.5, None, -1.0, None)


def test_a_replayed_decision_with_an_unscored_alternative_is_left_out_whole_and_alone() -> None:
    (found,) = Counterfactual().credit(group_of([replayed((1.0, None, 0.5), (0.0, 1.0, 1.0))]), NOTHING)
    assert found == (None,) * 7 + (-1.0, None, 0.5, None, 0.5, None)


def test_the_tokens_of_a_replayed_episode_are_trained_once_if_at_all() -> None:
    one = replayed((1.0, 0.0, 0.5), (0.0, 1.0, 1.0))
    credited = Counterfactual().credit(group_of([one]), NOTHING)
    (weights,) = token_weights([one], credited, Learner(credit=Counterfactual(), weighting="token"))
    assert weights == (0.0, *(1 / 6, 0.0) * 6)  # six alternatives with a sampled token each
    assert one.played == one.trajectories[:1]


def test_a_decision_with_an_unscored_alternative_is_left_out_whole() -> None:
    earned = list(branched().earned)
    earned[6] = None
    (found,) = Counterfactual().credit(
        EpisodeGroup("g0", branched().task, (replace(branched(), earned=tuple(earned)),)), NOTHING
    )
    assert found[5:7] == (None, None)
    # The verifier above still has a return, of the refiner that was scored.
    assert found[:5] == pytest.approx((0.75, -0.5, 0.5, 1.0, -1.0))
