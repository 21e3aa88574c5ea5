"""The policy gradient with a clipped importance weight: every token keeps a gradient."""

from __future__ import annotations

from matpo.objective.tokens import TokenLoss, Tokens, policy_gradient
from matpo.objective_config import Cispo


def cispo(objective: Cispo, tokens: Tokens) -> TokenLoss:
    """−sg[clip(R, 1−ε_low, 1+ε_high)]·A·log π (MiniMax-M1, arXiv 2506.13585)."""
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    ratio_T = tokens.fixed_ratio_T
    return policy_gradient(tokens, ratio_T.clamp(low, high), (ratio_T < low) | (ratio_T > high))
