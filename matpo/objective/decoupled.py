"""The clipped surrogate against the start of the step, weighted by what lies between that and the behaviour policy."""

from __future__ import annotations

from matpo.objective.tokens import TokenLoss, Tokens, clipped
from matpo.objective_config import Decoupled


def decoupled(objective: Decoupled, tokens: Tokens) -> TokenLoss:
    """−sg[min(ρ, C)]·min(r·A, clip(r)·A) (arXiv 2505.24298)."""
    old_T = tokens.old_T
    plain = clipped((tokens.logp_T - old_T).exp(), tokens.advantage_T, low=objective.clip_low, high=objective.clip_high)
    return TokenLoss((old_T - tokens.behaviour_T).exp().clamp(max=objective.ratio_cap) * plain.loss_T, plain.masked_T)
