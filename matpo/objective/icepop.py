"""Importance sampling that leaves out tokens on which the two policies disagree."""

from __future__ import annotations

import torch

from matpo.objective.tokens import TokenLoss, Tokens, policy_gradient
from matpo.objective_config import IcePop


def icepop(objective: IcePop, tokens: Tokens) -> TokenLoss:
    """−sg[R]·1[low ≤ R ≤ high]·A·log π (IcePop, arXiv 2510.18855)."""
    ratio_T = tokens.fixed_ratio_T
    masked_T = (ratio_T < objective.low) | (ratio_T > objective.high)
    return policy_gradient(tokens, torch.where(masked_T, 0.0, ratio_T), masked_T)
