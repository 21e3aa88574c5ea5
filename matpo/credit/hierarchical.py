"""Hierarchical groups: workers against the other workers of their caller, callers against the other trees'."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Literal

from matpo.credit.acts import Act, grouped, own_reward, spread
from matpo.credit.baselines import compared
from matpo.credit.scheme import GroupAdvantages, Memory, Scheme
from protocols.records import EpisodeGroup, EpisodeTree


class Hierarchical(Scheme):
    """A = own reward - mean over those of the same role with the same caller; a root is compared with the other roots.

    As hierarchical_grpo of prime-rl, where the callers are proposers and the workers solvers. A worker that is its
    caller's only one has nobody to be compared with and is not scored.
    """

    name: Literal["hierarchical"] = "hierarchical"
    needs = frozenset({"delegation", "earned"})
    judges = "acts"
    normalise_by_std: bool = False

    def credit(self, group: EpisodeGroup, memory: Memory) -> GroupAdvantages:
        scores: dict[Act, float | None] = {}
        for together in grouped(group, _caller):
            values = [own_reward(group.trees[number], index) for number, index in together]
            found = compared(values, baseline="mean", normalise_by_std=self.normalise_by_std)
            scores |= zip(together, found, strict=True)
        return spread(group, scores)


def _caller(act: Act, tree: EpisodeTree) -> Hashable:
    number, index = act
    trajectory = tree.trajectories[index]
    return trajectory.role if trajectory.parent is None else (number, trajectory.parent[0], trajectory.role)
