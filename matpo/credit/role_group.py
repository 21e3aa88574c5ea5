"""Dr. MAS: every role against itself, so that a role whose trees score otherwise than the others' has its own scale."""

from __future__ import annotations

import math
from typing import Literal, assert_never

from matpo.credit.acts import Act, grouped, spread
from matpo.credit.baselines import EPSILON
from matpo.credit.scheme import GroupAdvantages, Memory, Scheme
from protocols.records import EpisodeGroup, EpisodeTree

Row = Literal["turn", "trajectory", "tree"]


class RoleGroup(Scheme):
    """A = (r - μ_k) / (σ_k + ε), r the tree's reward, μ_k and σ_k over the rows of role k in the trees of the task.

    Dr. MAS (arXiv 2602.08847) counts every sampled turn of the role as a row, so trees in which it spoke
    often weigh more in its baseline. With n rows in all σ_k² = Σ (r - μ_k)² / (n - 1).
    """

    name: Literal["role_group"] = "role_group"
    needs = frozenset({"several_roles"})
    row: Row = "turn"
    """What counts once in the baseline: a sampled turn, a trajectory, or a tree in which the role took part."""

    def credit(self, group: EpisodeGroup, memory: Memory) -> GroupAdvantages:
        scores: dict[Act, float | None] = {}
        for rows in grouped(group, lambda act, tree: tree.trajectories[act[1]].role):
            scores |= self._role(group, rows)
        return spread(group, scores)

    def _role(self, group: EpisodeGroup, acts: tuple[Act, ...]) -> dict[Act, float | None]:
        """Of all acts of one role. A role that took part in one scored tree alone has nothing to be compared with."""
        scored = {act: reward for act in acts if (reward := group.trees[act[0]].reward) is not None}
        trees = [number for number, _ in scored]
        if len(set(trees)) < 2:
            return {}
        weights = {act: self._weight(group.trees[act[0]], act[1], trees.count(act[0])) for act in scored}
        total = sum(weights.values())
        mean = sum(weights[act] * reward for act, reward in scored.items()) / total
        square = sum(weights[act] * (reward - mean) ** 2 for act, reward in scored.items())
        scale = math.sqrt(square / (total - 1)) + EPSILON
        return {act: (reward - mean) / scale for act, reward in scored.items()}

    def _weight(self, tree: EpisodeTree, index: int, acts_in_tree: int) -> float:
        match self.row:
            case "turn":
                return max(1, sum(turn.kind == "sampled" for turn in tree.trajectories[index].turns))
            case "trajectory":
                return 1.0
            case "tree":
                return 1 / acts_in_tree
            case _:
                assert_never(self.row)
