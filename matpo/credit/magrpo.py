"""MAGRPO: return-to-go of joint actions, each agent's samples compared with its others from the same joint history."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from matpo.credit.acts import Act, joint_returns, siblings, spread, through_joints
from matpo.credit.baselines import Baseline, compared
from matpo.credit.scheme import GroupAdvantages, Memory, Scheme
from protocols.records import EpisodeGroup


class Magrpo(Scheme):
    """R(joint) = r + γ · mean R(joint actions that followed); A = R - mean R of the node (arXiv 2508.04652).

    With aligned pairing a sample is in one joint action and has its return; with cross pairing it is in several, and
    has their sum, as in CoMLRL, or their mean, which does not grow with the number of samples. The joint actions that
    start from the task are one node over all trees of the group.
    """

    name: Literal["magrpo"] = "magrpo"
    needs = frozenset({"joints", "alternatives", "returns"})
    judges = "acts"
    discount: float = Field(default=1.0, gt=0, le=1)
    """γ. (CoMLRL 1.4.3 reads its own setting of that name and never uses it.)"""
    cross: Literal["sum", "mean"] = "sum"
    """Return of a sample that is in several joint actions."""
    baseline: Baseline = "mean"
    """`mean`: MAGRPO. Its relatives: `none` MAREINFORCE, `others` MARLOO, `max` MAReMax."""
    normalise_by_std: bool = False
    """Not in the paper; on by default in CoMLRL 1.4.3."""

    @property
    def one_sided(self) -> bool:
        """Nothing is better than the best."""
        return self.baseline == "max"

    def credit(self, group: EpisodeGroup, memory: Memory) -> GroupAdvantages:
        values = [through_joints(tree, joint_returns(tree, self.discount), several=self.cross) for tree in group.trees]
        scores: dict[Act, float | None] = {}
        for together in siblings(group):
            found = [values[number].get(index) for number, index in together]
            advantages = compared(found, baseline=self.baseline, normalise_by_std=self.normalise_by_std)
            scores |= zip(together, advantages, strict=True)
        return spread(group, scores)
