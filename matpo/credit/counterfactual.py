"""C3: what would have come of the alternatives at the same decision, everything before it held fixed."""

from __future__ import annotations

from collections import defaultdict
from typing import Literal

from matpo.credit.acts import Act, joint_returns, returns, siblings, spread, through_joints
from matpo.credit.baselines import compared
from matpo.credit.scheme import GroupAdvantages, Memory, Scheme
from protocols.records import EpisodeGroup, EpisodeTree


class Counterfactual(Scheme):
    """A_j = mean return below alternative j - mean over the other alternatives of that state (arXiv 2603.06859).

    Where episodes were replayed (`episode.replay`), the alternatives are those drawn at their decisions, and nothing
    else is scored: the episodes themselves are context. A decision of which one alternative is not scored is left out
    whole: the released code then falls back to another baseline without saying so, which mixes two estimators.
    """

    name: Literal["counterfactual"] = "counterfactual"
    needs = frozenset({"counterfactuals"})
    judges = "acts"

    def credit(self, group: EpisodeGroup, memory: Memory) -> GroupAdvantages:
        scores: dict[Act, float | None] = {}
        for decision in _replayed(group) or _drawn(group):
            found = list(decision.values())
            if None not in found:
                scores |= zip(decision, compared(found, baseline="others", normalise_by_std=False), strict=True)
        return spread(group, scores)


def _replayed(group: EpisodeGroup) -> list[dict[Act, float | None]]:
    """Per decision at which episodes were replayed, its alternatives and what each led to."""
    decisions = defaultdict[tuple[int, int, int], dict[Act, float | None]](dict)
    for number, tree in enumerate(group.trees):
        for one in tree.replays:
            decisions[number, one.trajectory, one.turn][number, one.alternative] = one.reward
    return list(decisions.values())


def _drawn(group: EpisodeGroup) -> list[dict[Act, float | None]]:
    """Per state in which several acts were drawn while the episodes were played, the acts and their returns."""
    values = [_values(tree) for tree in group.trees]
    return [{(number, index): values[number].get(index) for number, index in acts} for acts in siblings(group)]


def _values(tree: EpisodeTree) -> dict[int, float | None]:
    if tree.joints:
        return through_joints(tree, joint_returns(tree, 1.0), several="mean")
    return dict(enumerate(returns(tree)))
