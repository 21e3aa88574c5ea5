"""Importance sampling with the fewest outliers left out that keep the log-ratio's second moment small."""

from __future__ import annotations

import torch
from torch import Tensor

from matpo.objective.tokens import TokenLoss, Tokens, policy_gradient, required


def m2po(tokens: Tokens) -> TokenLoss:
    """−M·sg[R]·A·log π (M2PO, arXiv 2510.01161); M is `second_moment_mask` of log ρ over all tokens of the step."""
    kept_T = required(tokens.kept_T, "the outliers of the whole step")
    return policy_gradient(tokens, torch.where(kept_T, tokens.fixed_ratio_T, 0.0), ~kept_T)


def second_moment_mask(log_ratio_N: Tensor, threshold: float) -> Tensor:
    """Which tokens stay (bool, shape N) when those with the largest (log ρ)² go until the mean of the rest is at most
    `threshold`. Tokens as large as one that goes, go too, so the order of tokens does not matter."""
    square_N = log_ratio_N.double().square()
    ascending_N = square_N.sort().values
    mean_N = ascending_N.cumsum(0) / torch.arange(1, len(square_N) + 1, device=square_N.device)
    fitting = int((mean_N <= threshold).sum())  # the mean of an ascending prefix never falls
    if fitting == len(square_N):
        return torch.ones_like(square_N, dtype=torch.bool)
    return square_N < ascending_N[fitting]
