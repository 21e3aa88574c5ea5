"""Shaping by difference: an act is credited with what it added to the score that the act before it had reached."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal

from matpo.credit.acts import Act, grouped, previous, round_of, spread, through_joints
from matpo.credit.baselines import compared, mean
from matpo.credit.scheme import GroupAdvantages, Memory, Scheme
from protocols.records import EpisodeGroup, EpisodeTree


class Difference(Scheme):
    """d_t = κ · Φ_t + (Φ_t - Q_t); A = d_t - mean d over the acts of that role and round in the group.

    Φ is what an act earned, or the reward of its joint action. UnityMAS-O (arXiv 2605.26646): κ = 0 and Q_t = Φ_{t-1}.
    MARTI-v2's margin (arXiv 2602.07848): κ = 1 / α and Q_t the mean of all earlier Φ, up to the factor α. A first act
    has Q = 0: it is credited with its whole score.
    """

    name: Literal["difference"] = "difference"
    needs = frozenset({"rounds"})
    judges = "acts"
    against: Literal["previous", "earlier_mean"] = "previous"
    """Q."""
    score_weight: float = 0.0
    """κ."""
    normalise_by_std: bool = False

    def credit(self, group: EpisodeGroup, memory: Memory) -> GroupAdvantages:
        values = [self._values(tree) for tree in group.trees]
        scores: dict[Act, float | None] = {}
        for together in grouped(group, _role_and_round):
            found = [values[number][index] for number, index in together]
            advantages = compared(found, baseline="mean", normalise_by_std=self.normalise_by_std)
            scores |= zip(together, advantages, strict=True)
        return spread(group, scores)

    def _values(self, tree: EpisodeTree) -> list[float | None]:
        joint = through_joints(tree, [joint.reward for joint in tree.joints], several="mean")
        reached = [tree.earned[index] if tree.earned else joint.get(index) for index in range(len(tree.trajectories))]
        return [self._value(tree, reached, index) for index in range(len(reached))]

    def _value(self, tree: EpisodeTree, reached: Sequence[float | None], index: int) -> float | None:
        score, earlier, at = reached[index], list[float | None](), previous(tree, index)
        while at is not None:
            earlier.append(reached[at])
            at = previous(tree, at)
        if score is None or (earlier and earlier[0] is None):
            return None
        before = (earlier[0] if self.against == "previous" else mean(earlier)) if earlier else 0.0
        return None if before is None else self.score_weight * score + score - before


def _role_and_round(act: Act, tree: EpisodeTree) -> Hashable:
    return tree.trajectories[act[1]].role, round_of(tree, act[1])
