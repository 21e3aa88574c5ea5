"""Truncated importance sampling, per token."""

from __future__ import annotations

from matpo.objective.tokens import TokenLoss, Tokens, policy_gradient
from matpo.objective_config import Tis


def tis(objective: Tis, tokens: Tokens) -> TokenLoss:
    """−sg[min(R, C)]·A·log π."""
    ratio_T = tokens.fixed_ratio_T
    return policy_gradient(tokens, ratio_T.clamp(max=objective.ratio_cap), ratio_T > objective.ratio_cap)
