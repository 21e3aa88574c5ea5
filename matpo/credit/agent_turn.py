"""AT-GRPO: the candidates of one agent at one turn, sampled from one state, compared by what each earned there."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from matpo.credit.acts import Act, siblings, spread, through_joints
from matpo.credit.baselines import compared
from matpo.credit.scheme import GroupAdvantages, Memory, Scheme
from protocols.records import EpisodeGroup, EpisodeTree


class AgentTurn(Scheme):
    """A = (v - μ) / (σ + ε) over the candidates, v = α · team + own (arXiv 2510.11062).

    team is the reward of the joint actions a candidate took part in (their mean), own what it earned itself, whichever
    of the two the topology records. What follows a candidate does not count, so only one needs to be played on.
    """

    name: Literal["agent_turn"] = "agent_turn"
    needs = frozenset({"alternatives", "joints"})
    judges = "acts"
    team_weight: float = Field(default=1.0, gt=0)
    """α."""

    def credit(self, group: EpisodeGroup, memory: Memory) -> GroupAdvantages:
        values = [self._values(tree) for tree in group.trees]
        scores: dict[Act, float | None] = {}
        for together in siblings(group):
            found = [values[number].get(index) for number, index in together]
            scores |= zip(together, compared(found, baseline="mean", normalise_by_std=True), strict=True)
        return spread(group, scores)

    def _values(self, tree: EpisodeTree) -> dict[int, float | None]:
        team = through_joints(tree, [joint.reward for joint in tree.joints], several="mean")
        weighed = {act: None if value is None else self.team_weight * value for act, value in team.items()}
        if not tree.earned:
            return weighed
        return {
            act: None if value is None or (own := tree.earned[act]) is None else value + own
            for act, value in weighed.items()
        }
