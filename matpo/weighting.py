"""The weight of every sampled token in the step's loss, fixed before anything is packed.

The loss is Σ_t w_t ℓ_t over all sampled tokens of the step, so micro-batch size, order and prefix sharing cannot
change the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

from matpo.config import Learner
from matpo.credit.scheme import TreeAdvantages
from protocols.records import INFRASTRUCTURE, EpisodeTree

TreeWeights = tuple[float, ...]
"""One per trajectory of a tree: the weight of each of its sampled tokens; 0 keeps it out of the loss."""


def token_weights(
    trees: Sequence[EpisodeTree], credited: Sequence[TreeAdvantages], learner: Learner
) -> tuple[TreeWeights, ...]:
    """Weight of each sampled token, per tree and trajectory, for one step.

    Only *counted* trajectories weigh anything: scored, not ended by infrastructure, with a sampled token. Over them,
    with n_i sampled tokens in tree i, m_j in trajectory j, I trees and J trajectories:
    `tree` 1 / (I n_i) (arXiv 2510.04678) · `trajectory` 1 / (J m_j) · `token` 1 / Σ n_i ·
    `constant` 1 / (I constant_tokens) (Dr. GRPO, arXiv 2503.20783). The first three sum to 1 over the step.
    A role factor multiplies the result and enters no denominator.
    """
    counts = [_counted(tree, scores) for tree, scores in zip(trees, credited, strict=True)]
    tree_total = sum(1 for row in counts if any(row))
    trajectory_total = sum(1 for row in counts for count in row if count)
    token_total = sum(sum(row) for row in counts)
    weights: list[TreeWeights] = []
    for tree, row in zip(trees, counts, strict=True):
        match learner.weighting:
            case "tree":
                denominators = [tree_total * sum(row)] * len(row)
            case "trajectory":
                denominators = [trajectory_total * count for count in row]
            case "token":
                denominators = [token_total] * len(row)
            case "constant":
                denominators = [tree_total * learner.constant_tokens] * len(row)
            case _:
                assert_never(learner.weighting)
        factors = [learner.role_factors.get(trajectory.role, 1.0) for trajectory in tree.trajectories]
        weights.append(
            tuple(
                factor / denominator if count else 0.0
                for factor, count, denominator in zip(factors, row, denominators, strict=True)
            )
        )
    return tuple(weights)


def _counted(tree: EpisodeTree, scores: TreeAdvantages) -> list[int]:
    """Sampled tokens of each trajectory, 0 where the trajectory is masked."""
    return [
        0 if score is None or trajectory.status in INFRASTRUCTURE else len(trajectory.versions)
        for trajectory, score in zip(tree.trajectories, scores, strict=True)
    ]
