"""PPO's clipped surrogate against the policy that sampled, as in the MATPO paper."""

from __future__ import annotations

import torch

from matpo.objective.tokens import TokenLoss, Tokens, clipped
from matpo.objective_config import Clip


def clip(objective: Clip, tokens: Tokens) -> TokenLoss:
    """−min(R·A, clip(R)·A); where A < 0 at most −c·A (dual clip, arXiv 1912.09729)."""
    plain = clipped(tokens.ratio_T, tokens.advantage_T, low=objective.clip_low, high=objective.clip_high)
    negative_T = tokens.advantage_T < 0
    bounded_T = torch.minimum(plain.loss_T, -objective.dual_clip * tokens.advantage_T)
    return TokenLoss(
        torch.where(negative_T, bounded_T, plain.loss_T),
        plain.masked_T | (negative_T & (tokens.fixed_ratio_T > objective.dual_clip)),
    )
