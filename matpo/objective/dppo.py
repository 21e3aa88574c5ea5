"""Truncated importance weight, a mask on how far a probability moved, and a penalty on the log-ratio."""

from __future__ import annotations

import torch

from matpo.objective.tokens import TokenLoss, Tokens
from matpo.objective_config import Dppo


def dppo(objective: Dppo, tokens: Tokens) -> TokenLoss:
    """−M·sg[min(R, C)]·A·log π + τ·(log R)²; M = 0 where π already moved by δ the way A pushes (DPPO-Binary-TV)."""
    log_ratio_T = tokens.logp_T - tokens.behaviour_T
    moved_T = tokens.logp_T.detach().exp() - tokens.behaviour_T.exp()
    masked_T = ((tokens.advantage_T > 0) & (moved_T > objective.delta)) | (
        (tokens.advantage_T < 0) & (moved_T < -objective.delta)
    )
    weight_T = tokens.fixed_ratio_T.clamp(max=objective.ratio_cap)
    gradient_T = torch.where(masked_T, 0.0, -weight_T * tokens.advantage_T) * tokens.logp_T
    return TokenLoss(gradient_T + objective.tau * log_ratio_T.square(), masked_T)
