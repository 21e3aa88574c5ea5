"""RAE: every role against a running mean of what it got so far, for games in which roles differ in their chances."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field

from matpo.credit.acts import acts, spread
from matpo.credit.baselines import mean
from matpo.credit.scheme import GroupAdvantages, Memory, Scheme
from protocols.records import EpisodeGroup, EpisodeTree


class RoleBaseline(Scheme):
    """A = r - b_k; after the step b_k ← d · b_k + (1 - d) · r, tree by tree; b_k starts at 0 (arXiv 2506.24119).

    r is what the act earned where the topology scores single acts, else the tree's total. A tree counts once per role,
    with the mean of its acts. The baselines are saved with every checkpoint.
    """

    name: Literal["role_baseline"] = "role_baseline"
    decay: float = Field(default=0.95, gt=0, lt=1)
    """d."""

    def credit(self, group: EpisodeGroup, memory: Memory) -> GroupAdvantages:
        rewards = {act: _reward(tree, act[1]) for act, tree in acts(group)}
        return spread(
            group,
            {
                act: None if reward is None else reward - memory.get(group.trees[act[0]].trajectories[act[1]].role, 0.0)
                for act, reward in rewards.items()
            },
        )

    def remember(self, memory: Memory, groups: Sequence[EpisodeGroup]) -> Memory:
        baselines = dict(memory)
        for tree in (tree for group in groups for tree in group.trees):
            for role, reward in _by_role(tree):
                baselines[role] = self.decay * baselines.get(role, 0.0) + (1 - self.decay) * reward
        return baselines


def _reward(tree: EpisodeTree, index: int) -> float | None:
    return tree.earned[index] if tree.earned else tree.reward


def _by_role(tree: EpisodeTree) -> Iterator[tuple[str, float]]:
    """What each role of a tree got on average, roles in order of name."""
    for role in sorted({trajectory.role for trajectory in tree.trajectories}):
        got = mean([_reward(tree, index) for index, t in enumerate(tree.trajectories) if t.role == role])
        if got is not None:
            yield role, got
