"""The credit scheme the config names: a group of trees in, one advantage per trajectory out."""

from __future__ import annotations

from typing import assert_never

from matpo.config import Learner
from matpo.credit.broadcast import broadcast
from matpo.credit.leave_one_out import leave_one_out
from protocols.records import EpisodeGroup

TreeAdvantages = tuple[float | None, ...]
"""One per trajectory of a tree; None means not scored (never 0) and keeps the trajectory out of the loss."""


def advantages(group: EpisodeGroup, learner: Learner) -> tuple[TreeAdvantages, ...]:
    """Advantage of every trajectory of every tree of one task.

    Both shipped schemes score the tree and give that one number, not a per-token tensor, to each of its trajectories;
    each trajectory's own `sampled` says which tokens it reaches.
    """
    rewards = tuple(tree.reward for tree in group.trees)
    match learner.credit:
        case "broadcast":
            scalars = broadcast(rewards, normalise_by_std=learner.normalise_by_std)
        case "leave_one_out":
            scalars = leave_one_out(rewards)
        case _:
            assert_never(learner.credit)
    return tuple((scalar,) * len(tree.trajectories) for scalar, tree in zip(scalars, group.trees, strict=True))
