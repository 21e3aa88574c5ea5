"""MAPoRL: an answer in a debate is worth its own score and, discounted, what all agents' later answers scored."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Literal

from pydantic import Field

from matpo.credit.acts import Act, grouped, spread
from matpo.credit.baselines import compared, mean
from matpo.credit.scheme import GroupAdvantages, Memory, Scheme
from protocols.records import EpisodeGroup, EpisodeTree


class LookAhead(Scheme):
    """v_{a,t} = [V_{a,t} + Σ_{t' > t} γ^{t' - t} mean_b V_{b,t'}] / Σ_{t' ≥ t} γ^{t' - t} (arXiv 2502.18439).

    V is what an answer earned (the verifier's score), and a round is a joint action. A = v - mean v over the same agent
    and round in the group: MAPoRL trains a value head instead (PPO), which we do not have. A round of which no answer
    is scored leaves the rounds before it unscored too.
    """

    name: Literal["look_ahead"] = "look_ahead"
    needs = frozenset({"rounds", "earned", "joints"})
    judges = "acts"
    discount: float = Field(default=0.3, ge=0, le=1)
    """γ; 0: every answer for itself."""
    normalise_by_std: bool = False

    def credit(self, group: EpisodeGroup, memory: Memory) -> GroupAdvantages:
        values = [self._values(tree) for tree in group.trees]
        rounds = [_rounds(tree) for tree in group.trees]

        def agent_and_round(act: Act, tree: EpisodeTree) -> Hashable | None:
            at = rounds[act[0]].get(act[1])
            return None if at is None else (tree.trajectories[act[1]].role, at)

        scores: dict[Act, float | None] = {}
        for together in grouped(group, agent_and_round):
            found = [values[number].get(index) for number, index in together]
            advantages = compared(found, baseline="mean", normalise_by_std=self.normalise_by_std)
            scores |= zip(together, advantages, strict=True)
        return spread(group, scores)

    def _values(self, tree: EpisodeTree) -> dict[int, float | None]:
        """v of every act, from the last round back: `future` and `weights` are the two sums beyond t' = t."""
        found: dict[int, float | None] = {}
        future: float | None = 0.0
        weights = 0.0
        for joint in reversed(tree.joints):
            for member in joint.members:
                own = tree.earned[member] if tree.earned else None
                found[member] = None if own is None or future is None else (own + future) / (1 + weights)
            average = mean([tree.earned[member] for member in joint.members]) if tree.earned else None
            future = None if future is None or average is None else self.discount * (average + future)
            weights = self.discount * (1 + weights)
        return found


def _rounds(tree: EpisodeTree) -> dict[int, int]:
    """Round of each act that was part of one; a debate has one joint action a round."""
    return {member: number for number, joint in enumerate(tree.joints) for member in joint.members}
