"""What an objective is given of every token, and what it returns.

T: sampled tokens. μ: behaviour probability recorded at sampling, π: current policy, π_old: policy at the start of the
step; R = π/μ, ρ = π_old/μ, r = π/π_old; sg: no gradient flows through. Formulas: docs/algorithm.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """Some sampled tokens. Everything is float32 of shape T; what an objective does not need may be None."""

    logp_T: Tensor
    """log π; gradients flow through it."""
    behaviour_T: Tensor
    """log μ."""
    advantage_T: Tensor
    old_logp_T: Tensor | None = None
    """log π_old; None at the first optimizer step of a batch, where π_old = sg[π]."""
    drift_T: Tensor | None = None
    """Mean of sg[log π − log μ] over the sampled tokens of the token's whole trajectory."""
    kept_T: Tensor | None = None
    """bool; False where an outlier of the whole step is left out."""
    entropy_T: Tensor | None = None
    """Entropy of π at the token; gradients flow through it."""
    reference_logp_T: Tensor | None = None

    @property
    def ratio_T(self) -> Tensor:
        """R; gradients flow through it."""
        return (self.logp_T - self.behaviour_T).exp()

    @property
    def fixed_ratio_T(self) -> Tensor:
        """sg[R]."""
        return (self.logp_T.detach() - self.behaviour_T).exp()

    @property
    def old_T(self) -> Tensor:
        """log π_old."""
        return self.logp_T.detach() if self.old_logp_T is None else self.old_logp_T


@dataclass(frozen=True, slots=True, eq=False)
class TokenLoss:
    """ℓ of every token, and where the objective stops the policy gradient of a token (mask, clip or truncation)."""

    loss_T: Tensor
    masked_T: Tensor


def policy_gradient(tokens: Tokens, weight_T: Tensor, masked_T: Tensor) -> TokenLoss:
    """−sg[weight]·A·log π, whose gradient is the weighted policy gradient."""
    return TokenLoss(-weight_T.detach() * tokens.advantage_T * tokens.logp_T, masked_T)


def clipped(ratio_T: Tensor, advantage_T: Tensor, *, low: float, high: float) -> TokenLoss:
    """PPO's −min(ratio·A, clip(ratio, 1 − low, 1 + high)·A) (arXiv 1707.06347)."""
    clipped_T = ratio_T.clamp(1 - low, 1 + high)
    loss_T = -torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T)
    at_T = ratio_T.detach()
    return TokenLoss(loss_T, ((advantage_T > 0) & (at_T > 1 + high)) | ((advantage_T < 0) & (at_T < 1 - low)))


def required(value: Tensor | None, name: str) -> Tensor:
    """What an objective cannot do without."""
    if value is None:
        raise ValueError(f"this objective needs {name}")
    return value
