"""Figures of whole trajectories, for objectives and masks that look at more than a token."""

from __future__ import annotations

import torch
from torch import Tensor


def trajectory_drift(logp_T: Tensor, behaviour_T: Tensor, trajectory_T: Tensor) -> Tensor:
    """Mean of sg[log π − log μ] over the sampled tokens of each token's trajectory, shape T; `trajectory_T` numbers the
    trajectories from 0. The sampled tokens must be all there."""
    if not len(logp_T):
        return torch.zeros_like(behaviour_T)
    log_ratio_T = (logp_T.detach() - behaviour_T).double()
    count = int(trajectory_T.max()) + 1
    sums = torch.zeros(count, dtype=torch.float64, device=logp_T.device).index_add_(0, trajectory_T, log_ratio_T)
    sizes = torch.zeros_like(sums).index_add_(0, trajectory_T, torch.ones_like(log_ratio_T))
    return (sums / sizes)[trajectory_T].to(logp_T.dtype)


def sequence_mask(drift_T: Tensor, advantage_T: Tensor, limit: float) -> Tensor:
    """Tokens to drop (bool, shape T): A < 0 in a trajectory that the policy left, mean(log μ − log π) > limit
    (off-policy sequence masking, DeepSeek-V3.2, arXiv 2512.02556 §3.1)."""
    return (advantage_T < 0) & (-drift_T > limit)
