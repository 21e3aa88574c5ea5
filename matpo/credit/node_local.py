"""RAO: an agent answers for its own work and for a share of its workers', against the other trees' roots."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from pydantic import Field

from matpo.credit.acts import Act, acts, children, depth, own_reward, spread
from matpo.credit.baselines import mean
from matpo.credit.scheme import GroupAdvantages, Memory, Scheme
from protocols.records import EpisodeGroup, EpisodeTree


class NodeLocal(Scheme):
    """r_v = s_v + λ · mean s of v's workers; A = w · (r_v - mean r_root of the other trees) (arXiv 2605.06639).

    s is what an act itself earned; the root's is the tree's total unless it has one of its own. With `level_depths`
    w = (mean number of scored acts per depth) / (their number at v's depth), so that many workers do not drown their
    planner; otherwise w = 1.
    """

    name: Literal["node_local"] = "node_local"
    needs = frozenset({"delegation", "earned"})
    judges = "acts"
    child_share: float = Field(default=0.4, ge=0)
    """λ."""
    level_depths: bool = True

    def credit(self, group: EpisodeGroup, memory: Memory) -> GroupAdvantages:
        values = {(n, i): value for n, tree in enumerate(group.trees) for i, value in enumerate(self._values(tree))}
        scores: dict[Act, float | None] = {}
        for act, _ in acts(group):
            value = values[act]
            others = mean([values[number, 0] for number in range(len(group.trees)) if number != act[0]])
            if value is not None and others is not None:
                scores[act] = value - others
        depths = {act: depth(tree, act[1]) for act, tree in acts(group) if act in scores}
        counts = Counter(depths.values())
        level = len(depths) / len(counts) if counts else 0.0
        if self.level_depths:
            scores = {act: None if s is None else s * level / counts[depths[act]] for act, s in scores.items()}
        return spread(group, scores)

    def _values(self, tree: EpisodeTree) -> list[float | None]:
        own = [own_reward(tree, index) for index in range(len(tree.trajectories))]
        shares = [mean([own[child] for child in below]) for below in children(tree)]
        return [
            None if value is None else value + self.child_share * (share or 0.0)
            for value, share in zip(own, shares, strict=True)
        ]
