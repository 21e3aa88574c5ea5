"""An act's own reward, raised where the whole tree came out right and lowered where it did not."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from matpo.credit.acts import Act, grouped, own_reward, spread
from matpo.credit.baselines import compared
from matpo.credit.scheme import GroupAdvantages, Memory, Scheme
from protocols.records import EpisodeGroup, EpisodeTree


class Multiplier(Scheme):
    """v = own reward · (up if the tree's total > right_above else down); A = (v - μ) / (σ + ε) over the role's acts.

    As the multi-agent example of slime, with its 1.2 and 0.8. Acts without a reward of their own are not scored; the
    root's is the tree's total unless it has one. An own reward of 0 stays 0 whatever the tree came to.
    """

    name: Literal["multiplier"] = "multiplier"
    needs = frozenset({"earned"})
    judges = "acts"
    up: float = Field(default=1.2, gt=0)
    down: float = Field(default=0.8, gt=0)
    right_above: float = 0.5

    def credit(self, group: EpisodeGroup, memory: Memory) -> GroupAdvantages:
        scores: dict[Act, float | None] = {}
        for together in grouped(group, lambda act, tree: tree.trajectories[act[1]].role):
            values = [self._value(group.trees[number], index) for number, index in together]
            scores |= zip(together, compared(values, baseline="mean", normalise_by_std=True), strict=True)
        return spread(group, scores)

    def _value(self, tree: EpisodeTree, index: int) -> float | None:
        own, total = own_reward(tree, index), tree.reward
        if own is None or total is None:
            return None
        return own * (self.up if total > self.right_above else self.down)
