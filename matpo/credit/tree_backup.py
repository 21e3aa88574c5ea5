"""MALT: an act is worth the mean of what the acts below it came to, and is compared with its alternatives."""

from __future__ import annotations

from typing import Literal

from matpo.credit.acts import Act, returns, siblings, spread
from matpo.credit.baselines import compared
from matpo.credit.scheme import GroupAdvantages, Memory, Scheme
from protocols.records import EpisodeGroup


class TreeBackup(Scheme):
    """V(leaf) = what it earned, V(act) = mean V of the acts below; A = V - mean V of its role's acts from that state.

    arXiv 2412.01928 labels an act good where V > 0.5 and trains on the labels; with `label_above`
    A = +1 where V is above it and -1 elsewhere.
    """

    name: Literal["tree_backup"] = "tree_backup"
    needs = frozenset({"alternatives", "leaf_scores", "returns"})
    judges = "acts"
    label_above: float | None = None

    def credit(self, group: EpisodeGroup, memory: Memory) -> GroupAdvantages:
        values = [returns(tree) for tree in group.trees]
        scores: dict[Act, float | None] = {}
        for together in siblings(group):
            found = [values[number][index] for number, index in together]
            scores |= zip(together, self._advantages(found), strict=True)
        return spread(group, scores)

    def _advantages(self, values: list[float | None]) -> tuple[float | None, ...]:
        if self.label_above is None:
            return compared(values, baseline="mean", normalise_by_std=False)
        return tuple(None if value is None else 1.0 if value > self.label_above else -1.0 for value in values)
