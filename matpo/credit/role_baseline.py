"""RAE: every role against a running mean of what it got so far, for games in which roles differ in their chances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from matpo.credit.scheme import GroupAdvantages, Memory, Scheme
from protocols.records import EpisodeGroup, EpisodeTree


class RoleBaseline(Scheme):
    """A = r - b_k with r the tree's reward; after the step b_k ← d · b_k + (1 - d) · r (arXiv 2506.24119).

    b_k starts at 0 and moves once per scored tree that role k took part in, in the order of the trees. It is saved with
    every checkpoint.
    """

    name: Literal["role_baseline"] = "role_baseline"
    decay: float = Field(default=0.95, gt=0, lt=1)
    """d."""

    def credit(self, group: EpisodeGroup, memory: Memory) -> GroupAdvantages:
        return tuple(
            tuple(
                None if tree.reward is None else tree.reward - memory.get(trajectory.role, 0.0)
                for trajectory in tree.trajectories
            )
            for tree in group.trees
        )

    def remember(self, memory: Memory, groups: Sequence[EpisodeGroup]) -> Memory:
        baselines = dict(memory)
        for tree in (tree for group in groups for tree in group.trees):
            if (reward := tree.reward) is not None:
                for role in roles(tree):
                    baselines[role] = self.decay * baselines.get(role, 0.0) + (1 - self.decay) * reward
        return baselines


def roles(tree: EpisodeTree) -> tuple[str, ...]:
    """Who took part, in order of name."""
    return tuple(sorted({trajectory.role for trajectory in tree.trajectories}))
