"""MATPO's credit: one scalar per tree, normalised over the trees of its task, given to every agent of the tree."""

from __future__ import annotations

from typing import Literal

from matpo.credit.acts import same_for_all
from matpo.credit.baselines import compared
from matpo.credit.scheme import GroupAdvantages, Memory, Scheme
from protocols.records import EpisodeGroup


class Broadcast(Scheme):
    """A_i = (r_i - mean_G) / (std_G + ε) over the scored trees of one task (arXiv 2510.04678)."""

    name: Literal["broadcast"] = "broadcast"
    normalise_by_std: bool = True
    """Divide by the standard deviation of the group."""

    def credit(self, group: EpisodeGroup, memory: Memory) -> GroupAdvantages:
        rewards = [tree.reward for tree in group.trees]
        return same_for_all(group, compared(rewards, baseline="mean", normalise_by_std=self.normalise_by_std))
