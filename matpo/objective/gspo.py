"""The clipped surrogate of a trajectory's mean ratio: a trajectory is clipped as a whole."""

from __future__ import annotations

from matpo.objective.tokens import TokenLoss, Tokens, clipped, required
from matpo.objective_config import Gspo


def gspo(objective: Gspo, tokens: Tokens) -> TokenLoss:
    """−min(s·A, clip(s)·A), s = exp(mean of log R over the trajectory), as one term per token:
    s_t = sg[s]·π/sg[π] has the value s, and over equally weighted tokens its gradients sum to that of the trajectory's
    s (GSPO-token, arXiv 2507.18071 §4.3)."""
    drift_T = required(tokens.drift_T, "the mean log-ratio of each token's trajectory")
    ratio_T = (drift_T + tokens.logp_T - tokens.logp_T.detach()).exp()
    return clipped(ratio_T, tokens.advantage_T, low=objective.clip_low, high=objective.clip_high)
