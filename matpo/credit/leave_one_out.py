"""Leave-one-out credit (RLOO): a tree against the mean of the other trees of its task."""

from __future__ import annotations

from typing import Literal

from matpo.credit.acts import same_for_all
from matpo.credit.baselines import compared
from matpo.credit.scheme import GroupAdvantages, Memory, Scheme
from protocols.records import EpisodeGroup


class LeaveOneOut(Scheme):
    """A_i = r_i - mean of the other scored rewards of the task, for every agent of the tree (arXiv 2402.14740)."""

    name: Literal["leave_one_out"] = "leave_one_out"

    def credit(self, group: EpisodeGroup, memory: Memory) -> GroupAdvantages:
        rewards = [tree.reward for tree in group.trees]
        return same_for_all(group, compared(rewards, baseline="others", normalise_by_std=False))
