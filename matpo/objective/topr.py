"""Full weight to what went well, a tapered one to what went badly."""

from __future__ import annotations

import torch

from matpo.objective.tokens import TokenLoss, Tokens, policy_gradient


def topr(tokens: Tokens) -> TokenLoss:
    """−A·log π where A ≥ 0; −sg[min(R, 1)]·A·log π where A < 0 (TOPR, arXiv 2503.14286, taken per token)."""
    ratio_T, negative_T = tokens.fixed_ratio_T, tokens.advantage_T < 0
    return policy_gradient(tokens, torch.where(negative_T, ratio_T.clamp(max=1.0), 1.0), negative_T & (ratio_T > 1))
