"""C3: what would have come of the alternatives at the same decision, everything before it held fixed."""

from __future__ import annotations

from typing import Literal

from matpo.credit.acts import Act, joint_returns, returns, siblings, spread, through_joints
from matpo.credit.baselines import compared
from matpo.credit.scheme import GroupAdvantages, Memory, Scheme
from protocols.records import EpisodeGroup, EpisodeTree


class Counterfactual(Scheme):
    """A_j = mean return below alternative j - mean over the other alternatives of that state (arXiv 2603.06859).

    A decision of which one alternative is not scored is left out whole: the released code then falls back to another
    baseline without saying so, which mixes two estimators.
    """

    name: Literal["counterfactual"] = "counterfactual"
    needs = frozenset({"alternatives", "returns"})
    judges = "acts"

    def credit(self, group: EpisodeGroup, memory: Memory) -> GroupAdvantages:
        values = [_values(tree) for tree in group.trees]
        scores: dict[Act, float | None] = {}
        for together in siblings(group):
            found = [values[number].get(index) for number, index in together]
            if None not in found:
                scores |= zip(together, compared(found, baseline="others", normalise_by_std=False), strict=True)
        return spread(group, scores)


def _values(tree: EpisodeTree) -> dict[int, float | None]:
    if tree.joints:
        return through_joints(tree, joint_returns(tree, 1.0), several="mean")
    return dict(enumerate(returns(tree)))
