"""Credit for one role alone (MLPO, PARL): the leader learns to lead agents that stay as they are."""

from __future__ import annotations

from typing import Literal

from matpo.credit.acts import acts, spread
from matpo.credit.baselines import compared
from matpo.credit.scheme import GroupAdvantages, Memory, Scheme
from protocols.records import EpisodeGroup


class OrchestratorOnly(Scheme):
    """A_i = (r_i - mean_G) / (std_G + ε) for the acts of one role; the others are not scored (arXiv 2507.08960)."""

    name: Literal["orchestrator_only"] = "orchestrator_only"
    needs = frozenset({"leader"})
    role: str | None = None
    """Who is trained; None: the role of each tree's first trajectory."""
    normalise_by_std: bool = True

    def credit(self, group: EpisodeGroup, memory: Memory) -> GroupAdvantages:
        rewards = [tree.reward for tree in group.trees]
        scalars = compared(rewards, baseline="mean", normalise_by_std=self.normalise_by_std)
        led = {
            act: scalars[act[0]]
            for act, tree in acts(group)
            if tree.trajectories[act[1]].role == (self.role or tree.trajectories[0].role)
        }
        return spread(group, led)
