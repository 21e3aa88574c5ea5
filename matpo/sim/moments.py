"""Bias and noise of a credit scheme's gradient, exactly: every group of episodes with its probability."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from statistics import median

import numpy as np
from numpy.typing import NDArray

from matpo.credit.role_baseline import RoleBaseline, roles
from matpo.credit.scheme import NOTHING, GroupAdvantages, Memory, Scheme
from matpo.sim.games import Game
from matpo.sim.table import GROUP, TASK, Choice, Decision, Outcome, every_outcome
from protocols.records import EpisodeGroup

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Moments:
    """Of a scheme's gradient estimate. Both are relative to the length of the exact gradient.

    How far a role's acts of a round move is a matter of its learning rate and of the loss weights, not of the credit,
    so for each role and round the mean estimate is first scaled to the length of the exact gradient.
    """

    bias: float
    """|scaled mean estimate - exact gradient|; 0 points where the gradient points, 2 the other way."""
    noise: float
    """Standard deviation of the scaled estimate from one group."""


class Enumerated:
    """A game played out in every way: O outcomes, and C choices (a decision and an action) that they are made of."""

    def __init__(self, game: Game) -> None:
        self.game = game
        self.outcomes: tuple[Outcome, ...] = every_outcome(game.play)
        self.choices: tuple[Choice, ...] = tuple(sorted({c for outcome in self.outcomes for c in outcome.choices}))
        self._place = {choice: number for number, choice in enumerate(self.choices)}
        self.rewards_O: Array = np.array([outcome.tree.reward for outcome in self.outcomes], np.float64)
        self.taken_OC: Array = np.stack(
            [self.by_choice(outcome, [1.0] * len(outcome.choices)) for outcome in self.outcomes]
        )

    def by_choice(self, outcome: Outcome, values: Sequence[float | None]) -> Array:
        """Values of the acts of an outcome, added up by choice."""
        total_C = np.zeros(len(self.choices))
        for choice, value in zip(outcome.choices, values, strict=True):
            total_C[self._place[choice]] += value or 0.0
        return total_C

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """Everything that is decided in some outcome."""
        return tuple(sorted({decision for decision, _ in self.choices}))

    def random_policy(self, random: np.random.Generator) -> Array:
        """log π of each choice, for standard normal logits."""
        logits = {decision: random.standard_normal(decision.actions) for decision in self.decisions}
        logs = {decision: values - math.log(np.exp(values).sum()) for decision, values in logits.items()}
        return np.array([logs[decision][action] for decision, action in self.choices])

    def probabilities(self, policy_C: Array) -> Array:
        """Of each outcome."""
        found: Array = np.exp(self.taken_OC @ policy_C)
        return found

    def value(self, policy_C: Array) -> float:
        """Expected reward."""
        return float(self.probabilities(policy_C) @ self.rewards_O)

    def best_value(self) -> float:
        """Expected reward of the best policy. Nothing is left to chance, so it has one outcome, in which every decision
        is taken the same way each time it comes up."""
        steady = [len(dict(outcome.choices)) == len(set(outcome.choices)) for outcome in self.outcomes]
        return float(self.rewards_O[steady].max())

    def scores(self, policy_C: Array) -> Array:
        """∇ log π of each choice with respect to all logits: one row per choice, one column per logit."""
        same_CC = np.array([[one == other for other, _ in self.choices] for one, _ in self.choices])
        found: Array = np.eye(len(self.choices)) - same_CC * np.exp(policy_C)
        return found

    def exact_gradient(self, policy_C: Array) -> Array:
        """∇ of the expected reward: Σ over outcomes of probability · reward · ∇ log probability."""
        found: Array = (self.probabilities(policy_C) * self.rewards_O) @ self.taken_OC @ self.scores(policy_C)
        return found

    def mean_rewards(self, policy_C: Array) -> Memory:
        """What each role gets on average: where running means settle."""
        weight, total = defaultdict[str, float](float), defaultdict[str, float](float)
        for outcome, probability in zip(self.outcomes, self.probabilities(policy_C), strict=True):
            for role in roles(outcome.tree):
                weight[role] += float(probability)
                total[role] += float(probability) * (outcome.tree.reward or 0.0)
        return {role: total[role] / weight[role] for role in total}

    def blocks(self) -> tuple[NDArray[np.bool_], ...]:
        """Which logits belong to the same role and round."""
        kinds = [(decision.role, decision.round) for decision, _ in self.choices]
        return tuple(np.array([kind == other for other in kinds]) for kind in sorted(set(kinds)))


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Every group of episodes a game can give (M of them, order aside) and the credit of a scheme in it."""

    game: Enumerated
    members_MG: NDArray[np.int64]
    ways_M: Array
    """Orders in which the group can come."""
    credit_MC: Array
    """Mean over the trees of the advantages given to each choice."""

    @classmethod
    def credited(cls, game: Enumerated, scheme: Scheme, memory: Memory) -> Groups:
        size = game.game.group_size
        members = list(combinations_with_replacement(range(len(game.outcomes)), size))
        ways = [math.factorial(size) / math.prod(map(math.factorial, Counter(group).values())) for group in members]
        credit = np.zeros((len(members), len(game.choices)))
        for number, group in enumerate(members):
            trees = EpisodeGroup(GROUP, TASK, tuple(game.outcomes[member].tree for member in group))
            credit[number] = _added_up(game, group, scheme.credit(trees, memory)) / size
        return cls(game, np.array(members), np.array(ways), credit)

    def moments(self, policy_C: Array) -> Moments:
        """Exact bias and noise at one policy."""
        game = self.game
        chance_M = self.ways_M * game.probabilities(policy_C)[self.members_MG].prod(axis=1)
        estimate_MC = self.credit_MC @ game.scores(policy_C)
        mean_C, exact_C = chance_M @ estimate_MC, game.exact_gradient(policy_C)
        variance_C = chance_M @ (estimate_MC - mean_C) ** 2
        bias = noise = 0.0
        for block in game.blocks():
            length = float(np.linalg.norm(mean_C[block]))
            scale = float(np.linalg.norm(exact_C[block])) / length if length > 1e-12 else 0.0
            bias += float(((scale * mean_C - exact_C)[block] ** 2).sum())
            noise += scale**2 * float(variance_C[block].sum())
        whole = float(np.linalg.norm(exact_C))
        return Moments(math.sqrt(bias) / whole, math.sqrt(noise) / whole)


def _added_up(game: Enumerated, group: Sequence[int], advantages: GroupAdvantages) -> Array:
    total_C = np.zeros(len(game.choices))
    for member, values in zip(group, advantages, strict=True):
        total_C += game.by_choice(game.outcomes[member], values)
    return total_C


def typical_moments(game: Enumerated, scheme: Scheme, policies: Sequence[Array]) -> Moments:
    """Medians over policies. A scheme with a memory has its running means settled at each."""
    if isinstance(scheme, RoleBaseline):
        found = [Groups.credited(game, scheme, game.mean_rewards(policy)).moments(policy) for policy in policies]
    else:
        groups = Groups.credited(game, scheme, NOTHING)
        found = [groups.moments(policy) for policy in policies]
    return Moments(median(m.bias for m in found), median(m.noise for m in found))
