"""The simulator's arithmetic, against finite differences and numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from matpo.cli.sim import TRIED, table
from matpo.credit.broadcast import Broadcast
from matpo.credit.counterfactual import Counterfactual
from matpo.credit.leave_one_out import LeaveOneOut
from matpo.credit.magrpo import Magrpo
from matpo.credit.orchestrator_only import OrchestratorOnly
from matpo.credit.role_baseline import RoleBaseline
from matpo.credit.scheme import NOTHING
from matpo.sim.games import GAMES, Game
from matpo.sim.moments import Array, Enumerated, Groups, typical_moments
from matpo.sim.table import Decision, Table


def coin(table: Table) -> float:
    """Reward 1 for the second of two actions."""
    _, action = table.act(Decision("agent", 0, "", 2))
    return float(action)


COIN = Game("coin", coin, frozenset(), 2)
EVEN = np.log(np.array([0.5, 0.5]))


def game(name: str) -> Game:
    return next(game for game in GAMES if game.name == name)


@pytest.mark.parametrize("played", GAMES, ids=lambda played: played.name)
def test_outcomes_are_all_ways_a_game_can_go(played: Game) -> None:
    enumerated = Enumerated(played)
    policy = enumerated.random_policy(np.random.default_rng(1))
    assert enumerated.probabilities(policy).sum() == pytest.approx(1.0)
    assert len({outcome.tree.tree_id for outcome in enumerated.outcomes}) == len(enumerated.outcomes)


@pytest.mark.parametrize("played", GAMES, ids=lambda played: played.name)
def test_the_exact_gradient_is_the_slope_of_the_expected_reward(played: Game) -> None:
    enumerated = Enumerated(played)
    policy = enumerated.random_policy(np.random.default_rng(2))

    def value(logits: Array) -> float:
        chances = [
            np.exp(logits[np.array([d == decision for d, _ in enumerated.choices])]).sum()
            for decision, _ in enumerated.choices
        ]
        return enumerated.value(logits - np.log(chances))

    step = 1e-5
    slopes = [(value(policy + step * axis) - value(policy - step * axis)) / (2 * step) for axis in np.eye(len(policy))]
    assert enumerated.exact_gradient(policy) == pytest.approx(slopes, abs=1e-8)


def test_the_moments_of_a_coin_by_hand() -> None:
    # Pairs 00, 01, 10, 11 with 1/4 each. ∇J = ±1/4. Leave-one-out: ±1 where they differ, whose estimate is
    # (1/2) (1 · 1/2 + 1 · 1/2) = 1/2 in each logit, else 0: mean 1/4, variance 1/4 · 1/4 = 1/16 per logit.
    enumerated = Enumerated(COIN)
    assert enumerated.exact_gradient(EVEN) == pytest.approx([-0.25, 0.25])
    found = Groups.credited(enumerated, LeaveOneOut(), NOTHING).moments(EVEN)
    assert found.bias == pytest.approx(0.0, abs=1e-12)
    # two logits of variance 1/16 over |∇J|² = 2/16
    assert found.noise == pytest.approx(math.sqrt((2 / 16) / (2 / 16)))


def test_the_best_policy_of_each_game_is_known() -> None:
    best = {played.name: Enumerated(played).best_value() for played in GAMES}
    assert best == pytest.approx(
        {
            "bandit": 1,
            "delegation": 1,
            "relay": 0.9,
            "relay, replayed": 0.9,
            "writing": 1,
            "joint turns": 2,
            "joint, crossed": 1,
            "debate": 1,
        }
    )


def some_policies(enumerated: Enumerated) -> list[Array]:
    random = np.random.default_rng(3)
    return [enumerated.random_policy(random) for _ in range(3)]


@pytest.mark.parametrize("name", ["bandit", "delegation", "debate", "joint, crossed"])
def test_centred_rewards_have_no_bias_and_dividing_them_by_their_deviation_has_some(name: str) -> None:
    enumerated = Enumerated(game(name))
    policies = some_policies(enumerated)
    for unbiased in (LeaveOneOut(), RoleBaseline(), Broadcast(normalise_by_std=False)):
        assert typical_moments(enumerated, unbiased, policies).bias == pytest.approx(0.0, abs=1e-9)
    assert typical_moments(enumerated, Broadcast(), policies).bias > 0.01


def test_an_orchestrators_credit_leaves_the_workers_gradient_out() -> None:
    enumerated = Enumerated(game("delegation"))
    (policy, *_) = some_policies(enumerated)
    exact = enumerated.exact_gradient(policy)
    workers = np.array([decision.role == "worker" for decision, _ in enumerated.choices])
    missing = float(np.linalg.norm(exact[workers]) / np.linalg.norm(exact))
    scheme = OrchestratorOnly(normalise_by_std=False)
    assert typical_moments(enumerated, scheme, [policy]).bias == pytest.approx(missing)


def test_comparing_alternatives_is_less_noisy_than_comparing_whole_trees() -> None:
    enumerated = Enumerated(game("joint, crossed"))
    policies = some_policies(enumerated)
    inside, whole = (typical_moments(enumerated, scheme, policies) for scheme in (Magrpo(), LeaveOneOut()))
    assert inside.bias == pytest.approx(0.0, abs=1e-9)
    assert inside.noise < 0.8 * whole.noise


def test_replayed_decisions_have_the_exact_gradient_of_the_episodes_that_they_replay() -> None:
    whole, replayed = Enumerated(game("relay")), Enumerated(game("relay, replayed"))
    policies = some_policies(whole)
    assert whole.choices == replayed.choices
    for policy in policies:
        assert replayed.exact_gradient(policy) == pytest.approx(whole.exact_gradient(policy))
    assert typical_moments(replayed, Counterfactual(), policies).bias == pytest.approx(0.0, abs=1e-9)
    assert not game("relay, replayed").suits(LeaveOneOut())


def test_the_table_lists_every_scheme_some_game_has_the_evidence_for() -> None:
    listed = {scheme.name for scheme in TRIED if any(played.suits(scheme) for played in GAMES)}
    assert listed == {scheme.name for scheme in TRIED}
    lines = list(table(COIN, policies=1, seed=0))
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ")][1:] == [
        "broadcast",
        "leave_one_out",
        "role_baseline",
        "broadcast normalise_by_std=False",
    ]
