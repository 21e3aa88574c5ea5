"""Credit for agents that act at once, in rounds: two agents, two turns, worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from matpo.credit.agent_turn import AgentTurn
from matpo.credit.counterfactual import Counterfactual
from matpo.credit.difference import Difference
from matpo.credit.look_ahead import LookAhead
from matpo.credit.magrpo import Magrpo
from matpo.credit.scheme import NOTHING, Scheme, TreeAdvantages
from protocols.records import EpisodeGroup, EpisodeTree, Joint, Trajectory
from tests.matpo.trees import group_of, trajectory, tree


def act(role: str, parent: int | None = None) -> Trajectory:
    """A first act, or the same agent's next one: a fork whose prompt holds the whole history and is not trained."""
    return trajectory(".x" if parent is None else "...x", role=role, parent=None if parent is None else (parent, 1))


def credited(scheme: Scheme, *trees: EpisodeTree) -> TreeAdvantages:
    """Advantages of the first tree."""
    return scheme.credit(EpisodeGroup("g0", trees[0].task, trees), NOTHING)[0]


def aligned() -> EpisodeTree:
    """Two samples per node, the j-th of both agents paired: rewards 1 and 0, then 2, 0 after the first and 1, 5 after
    the second. Acts 0 … 3 are a, b, a, b of turn 1; 4 … 11 of turn 2."""
    acts = [act("a"), act("b"), act("a"), act("b")]
    acts += [
        act(role, parent) for first in (0, 2) for _ in range(2) for role, parent in (("a", first), ("b", first + 1))
    ]
    rewards = (2.0, 0.0, 1.0, 5.0)
    joints = [Joint(members=(0, 1), reward=1.0), Joint(members=(2, 3), reward=0.0)]
    joints += [Joint(members=(4 + 2 * n, 5 + 2 * n), after=n // 2, reward=reward) for n, reward in enumerate(rewards)]
    return tree(2.5, *acts, joints=tuple(joints))


CROSS_ROOT = (0.0, 1.0, 0.0, 3.0)
CROSS_NEXT = ((1.0, 2.0, 3.0, 4.0), (0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 4.0), (2.0, 2.0, 2.0, 2.0))
"""Rewards of (first a, first b), (first a, second b), (second a, first b), (second a, second b) of a node."""


def crossed() -> EpisodeTree:
    """Two samples per agent and node, all four pairs: a, a, b, b of turn 1, then the same after each pair."""
    acts = [act("a"), act("a"), act("b"), act("b")]
    pairs = [(0, 2), (0, 3), (1, 2), (1, 3)]
    joints = [Joint(members=pair, reward=reward) for pair, reward in zip(pairs, CROSS_ROOT, strict=True)]
    for before, ((a, b), rewards) in enumerate(zip(pairs, CROSS_NEXT, strict=True)):
        base = len(acts)
        acts += [act("a", a), act("a", a), act("b", b), act("b", b)]
        joints += [
            Joint(members=(base + x, base + y), after=before, reward=reward)
            for (x, y), reward in zip(pairs, rewards, strict=True)
        ]
    return tree(2.375, *acts, joints=tuple(joints))


def test_aligned_samples_have_the_return_to_go_of_their_joint_action_less_the_mean_of_their_node() -> None:
    # R = 1 + (2 + 0) / 2 = 2 and 0 + (1 + 5) / 2 = 3, mean 2.5; below, 2 and 0 around 1, 1 and 5 around 3.
    found = credited(Magrpo(), aligned())
    assert found == pytest.approx((-0.5, -0.5, 0.5, 0.5, 1.0, 1.0, -1.0, -1.0, -2.0, -2.0, 2.0, 2.0))


def test_the_discount_shortens_the_return() -> None:
    # 1 + 0.5 · 1 = 0 + 0.5 · 3: the two first joint actions are worth the same.
    found = credited(Magrpo(discount=0.5), aligned())
    assert found == pytest.approx((0.0, 0.0, 0.0, 0.0, 1.0, 1.0, -1.0, -1.0, -2.0, -2.0, 2.0, 2.0))


def test_crossed_samples_have_the_sum_over_the_joint_actions_they_are_in() -> None:
    found = credited(Magrpo(), crossed())
    # R of the pairs: 0 + 2.5, 1 + 0, 0 + 1, 3 + 2. Sums of a: 3.5 and 6; of b: 2.5 + 1 and 1 + 5.
    assert found[:4] == pytest.approx((-1.25, 1.25, -1.25, 1.25))
    # After (a1, b1): a has 1 + 2 and 3 + 4, b has 1 + 3 and 2 + 4. After (a2, b1): a has 0 and 4, b too.
    assert found[4:8] == pytest.approx((-2.0, 2.0, -1.0, 1.0))
    assert found[8:12] == pytest.approx((0.0,) * 4)
    assert found[12:16] == pytest.approx((-2.0, 2.0, -2.0, 2.0))
    assert found[16:] == pytest.approx((0.0,) * 4)


def test_the_mean_over_joint_actions_does_not_grow_with_their_number() -> None:
    summed, averaged = credited(Magrpo(), crossed()), credited(Magrpo(cross="mean"), crossed())
    assert [a for a in averaged if a is not None] == pytest.approx([a / 2 for a in summed if a is not None])


def test_the_rewarded_pair_of_a_crossed_node_has_a_positive_advantage() -> None:
    # CoMLRL 1.4.3 with joint_mode "crossed" gave the only rewarded action a negative one.
    one = tree(
        2.5,
        *(act(role) for role in "aabb"),
        joints=tuple(Joint(members=(x, y), reward=10.0 * (x == 1 and y == 3)) for x in (0, 1) for y in (2, 3)),
    )
    assert credited(Magrpo(), one) == (-5.0, 5.0, -5.0, 5.0)


def test_the_first_node_is_one_over_all_trees_of_the_group_and_later_ones_are_not() -> None:
    other = tree(4.0, act("a"), act("b"), joints=(Joint(members=(0, 1), reward=4.0),), name="t1")
    first, second = Magrpo().credit(group_of([aligned(), other]), NOTHING)
    assert first[:4] == pytest.approx((-1.0, -1.0, 0.0, 0.0))  # 2, 3 and 4 around 3
    assert second == pytest.approx((1.0, 1.0))
    assert first[4:] == credited(Magrpo(), aligned())[4:]


def test_a_branch_that_stopped_early_is_worth_its_own_reward() -> None:
    stopped = replace(aligned(), joints=aligned().joints[:4], trajectories=aligned().trajectories[:8])
    assert credited(Magrpo(), stopped)[:4] == pytest.approx((1.0, 1.0, -1.0, -1.0))  # R = 2 and 0


def test_what_was_not_scored_has_no_return_and_neither_has_what_led_to_nothing_else() -> None:
    joints = [
        joint.model_copy(update={"reward": None}) if n in (2, 3) else joint for n, joint in enumerate(aligned().joints)
    ]
    unscored = replace(aligned(), joints=tuple(joints))
    assert credited(Magrpo(), unscored)[:8] == (None,) * 8


def test_relatives_of_magrpo_differ_in_the_baseline() -> None:
    assert credited(Magrpo(baseline="none"), aligned())[:4] == (2.0, 2.0, 3.0, 3.0)
    assert credited(Magrpo(baseline="max"), aligned())[:4] == (-1.0, -1.0, 0.0, 0.0)
    assert credited(Magrpo(baseline="others"), aligned())[:4] == (-1.0, -1.0, 1.0, 1.0)
    assert credited(Magrpo(normalise_by_std=True), aligned())[:4] == pytest.approx(
        (-0.5 / 0.5**0.5, -0.5 / 0.5**0.5, 0.5 / 0.5**0.5, 0.5 / 0.5**0.5), abs=1e-5
    )


def test_a_counterfactual_of_joint_actions_is_the_mean_over_what_the_others_did() -> None:
    # Means of a: 1.75 and 3.
    assert credited(Counterfactual(), crossed())[:4] == pytest.approx((-1.25, 1.25, -1.25, 1.25))


def test_candidates_at_a_turn_are_compared_by_that_turn_alone() -> None:
    # Turn 1: rewards 1 and 0, whatever followed; std of (1, 0) is 0.7071.
    found = credited(AgentTurn(), aligned())
    unit = 0.5**0.5
    assert found[:4] == pytest.approx((unit, unit, -unit, -unit), abs=1e-5)
    assert found[8:] == pytest.approx((-unit, -unit, unit, unit), abs=1e-5)


def test_a_candidate_has_the_weighed_team_reward_and_its_own() -> None:
    joints = (Joint(members=(0, 1), reward=1.0), Joint(members=(2, 3), reward=0.0))
    one = tree(0.5, *(act(role) for role in "abab"), joints=joints, earned=(0.0, 1.0, 3.0, None))
    # a: 2 · 1 + 0 and 2 · 0 + 3, std 0.7071; b: its second candidate is not scored, so the first is alone.
    found = credited(AgentTurn(team_weight=2.0), one)
    assert found[0] == pytest.approx(-(0.5**0.5), abs=1e-5)
    assert (found[1], found[3]) == (None, None)


def debate(name: str, *rounds: tuple[float | None, float | None]) -> EpisodeTree:
    """Two agents, one act each a round, scored one by one."""
    acts = [act(role, None if n == 0 else 2 * (n - 1) + k) for n in range(len(rounds)) for k, role in enumerate("ab")]
    joints = tuple(Joint(members=(2 * n, 2 * n + 1), after=n - 1 if n else None) for n in range(len(rounds)))
    return tree(0.5, *acts, earned=tuple(score for pair in rounds for score in pair), joints=joints, name=name)


def test_an_answer_is_worth_its_score_and_all_agents_later_ones_discounted() -> None:
    first = debate("t0", (1.0, 0.0), (1.0, 0.5))
    second = debate("t1", (0.0, 0.0), (0.0, 0.0))
    # (1 + 0.3 · 0.75) / 1.3 and (0 + 0.225) / 1.3 against 0, then 1 and 0.5 against 0; the mean halves them.
    found = credited(LookAhead(), first, second)
    assert found == pytest.approx((1.225 / 1.3 / 2, 0.225 / 1.3 / 2, 0.5, 0.25))


def test_looking_ahead_over_three_rounds() -> None:
    first = debate("t0", (1.0, 0.0), (1.0, 0.5), (0.2, 0.4))
    second = debate("t1", (0.0, 0.0), (0.0, 0.0), (0.0, 0.0))
    # round 1: 1 + 0.5 · 0.75 + 0.25 · 0.3 = 1.45 over 1.75; round 2: 1 + 0.5 · 0.3 over 1.5
    found = credited(LookAhead(discount=0.5), first, second)
    assert (found[0], found[2], found[4]) == pytest.approx((1.45 / 1.75 / 2, 1.15 / 1.5 / 2, 0.1))


def test_without_a_discount_every_answer_stands_for_itself() -> None:
    found = credited(LookAhead(discount=0.0), debate("t0", (1.0, 0.0), (1.0, 0.5)), debate("t1", (0, 0), (0, 0)))
    assert found == pytest.approx((0.5, 0.0, 0.5, 0.25))


def test_a_round_nobody_scored_leaves_the_rounds_before_it_unscored() -> None:
    found = credited(LookAhead(), debate("t0", (1.0, 0.0), (None, None)), debate("t1", (0.0, 0.0), (0.0, 0.0)))
    assert found == (None,) * 4


def test_a_difference_credits_what_an_act_added() -> None:
    first, second = debate("t0", (0.2, 0.0), (0.8, None)), debate("t1", (0.5, 1.0), (0.4, 1.0))
    # a: 0.2 and 0.5, then +0.6 and -0.1. b: 0 and 1; its second answer in the first tree is not scored.
    assert credited(Difference(), first, second) == pytest.approx((-0.15, -0.5, 0.35, None))


def test_a_difference_may_be_taken_from_the_mean_of_all_earlier_scores() -> None:
    first, second = debate("t0", (0.2, 0), (0.8, 0), (0.5, 0)), debate("t1", (0, 0), (0, 0), (0, 0))
    assert credited(Difference(), first, second)[4] == pytest.approx(-0.3 / 2)
    assert credited(Difference(against="earlier_mean"), first, second)[4] == pytest.approx(0.0)
    with_score = Difference(against="earlier_mean", score_weight=2.0)
    assert credited(with_score, first, second)[4] == pytest.approx((2 * 0.5 + 0.0) / 2)


def test_differences_of_joint_rewards_need_no_scores_of_single_acts() -> None:
    # Turn 2 after reward 1: 2 - 1 and 0 - 1; after reward 0: 1 and 5. Mean 1.5.
    assert credited(Difference(), aligned())[4::2] == pytest.approx((-0.5, -2.5, -0.5, 3.5))
