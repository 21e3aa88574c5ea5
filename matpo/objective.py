"""The loss of one sampled token under each objective, and the figures that say whether a step was sound.

T: sampled tokens. μ: behaviour probability recorded at sampling, π: current policy, π_old: policy at the start of the
step; R = π/μ, ρ = π_old/μ, r = π/π_old. Formulas and sources: docs/algorithm.md and the config section of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from matpo.config import Clip, Decoupled, Dppo, Objective, Tis
from protocols.records import Record


@dataclass(frozen=True, slots=True, eq=False)
class TokenLoss:
    """ℓ of every token, and where the objective stops the policy gradient of a token (mask, clip or truncation)."""

    loss_T: Tensor
    masked_T: Tensor


def needs_old_policy(objective: Objective) -> bool:
    """Whether ℓ depends on π_old: with several optimizer steps per batch it then takes a forward pass of its own."""
    return isinstance(objective, Decoupled)


def token_loss(
    objective: Objective,
    logp_T: Tensor,
    *,
    old_logp_T: Tensor | None,
    behaviour_T: Tensor,
    advantage_T: Tensor,
    entropy_T: Tensor | None = None,
    reference_logp_T: Tensor | None = None,
) -> TokenLoss:
    """ℓ per token, differentiable in `logp_T` = log π and in `entropy_T`, the entropy of π at each token.

    `behaviour_T` = log μ; `old_logp_T` = log π_old, or None when the step is the first of its batch, where
    π_old = sg[π]; `entropy_T` and `reference_logp_T` are read only by terms that need them. All float32, of shape T.
    """
    policy = _policy_loss(objective, logp_T, old_logp_T, behaviour_T, advantage_T)
    loss_T = policy.loss_T
    if objective.reference_kl:
        if reference_logp_T is None:
            raise ValueError("reference_kl needs the log-probabilities of the reference model")
        loss_T = loss_T + objective.reference_kl * reference_kl(logp_T, reference_logp_T)
    if objective.entropy_bonus:
        if entropy_T is None:
            raise ValueError("entropy_bonus needs the entropy of the policy")
        loss_T = loss_T - objective.entropy_bonus * entropy_T
    return TokenLoss(loss_T, policy.masked_T)


def reference_kl(logp_T: Tensor, reference_logp_T: Tensor) -> Tensor:
    """k3: π_ref/π − 1 − log(π_ref/π), never negative, whose mean over tokens of π is KL(π‖π_ref)
    (http://joschu.net/blog/kl-approx.html)."""
    log_ratio_T = reference_logp_T - logp_T
    return log_ratio_T.exp() - 1 - log_ratio_T


def _policy_loss(
    objective: Objective, logp_T: Tensor, old_logp_T: Tensor | None, behaviour_T: Tensor, advantage_T: Tensor
) -> TokenLoss:
    match objective:
        case Dppo():
            return _dppo(objective, logp_T, behaviour_T, advantage_T)
        case Clip():
            return _clip(objective, logp_T, behaviour_T, advantage_T)
        case Decoupled():
            old_T = logp_T.detach() if old_logp_T is None else old_logp_T
            return _decoupled(objective, logp_T, old_T, behaviour_T, advantage_T)
        case Tis():
            ratio_T = (logp_T.detach() - behaviour_T).exp()
            loss_T = -ratio_T.clamp(max=objective.ratio_cap) * advantage_T * logp_T
            return TokenLoss(loss_T, ratio_T > objective.ratio_cap)
        case _:
            assert_never(objective)


def _dppo(objective: Dppo, logp_T: Tensor, behaviour_T: Tensor, advantage_T: Tensor) -> TokenLoss:
    """−M·sg[min(R, C)]·A·log π + τ·(log R)²; M = 0 where π already moved by δ the way A pushes."""
    log_ratio_T = logp_T - behaviour_T
    now_T = logp_T.detach()
    moved_T = now_T.exp() - behaviour_T.exp()
    masked_T = ((advantage_T > 0) & (moved_T > objective.delta)) | ((advantage_T < 0) & (moved_T < -objective.delta))
    ratio_T = (now_T - behaviour_T).exp().clamp(max=objective.ratio_cap)
    gradient_T = torch.where(masked_T, 0.0, -ratio_T * advantage_T) * logp_T
    return TokenLoss(gradient_T + objective.tau * log_ratio_T.square(), masked_T)


def _clip(objective: Clip, logp_T: Tensor, behaviour_T: Tensor, advantage_T: Tensor) -> TokenLoss:
    """−min(R·A, clip(R)·A); where A < 0 at most −c·A (dual clip, arXiv 1912.09729)."""
    ratio_T = (logp_T - behaviour_T).exp()
    loss_T, masked_T = _clipped(ratio_T, advantage_T, low=objective.clip_low, high=objective.clip_high)
    bounded_T = torch.where(advantage_T < 0, torch.minimum(loss_T, -objective.dual_clip * advantage_T), loss_T)
    return TokenLoss(bounded_T, masked_T | ((advantage_T < 0) & (ratio_T.detach() > objective.dual_clip)))


def _decoupled(
    objective: Decoupled, logp_T: Tensor, old_logp_T: Tensor, behaviour_T: Tensor, advantage_T: Tensor
) -> TokenLoss:
    """−sg[min(ρ, C)]·min(r·A, clip(r)·A) (arXiv 2505.24298)."""
    ratio_T = (logp_T - old_logp_T).exp()
    loss_T, masked_T = _clipped(ratio_T, advantage_T, low=objective.clip_low, high=objective.clip_high)
    return TokenLoss((old_logp_T - behaviour_T).exp().clamp(max=objective.ratio_cap) * loss_T, masked_T)


def _clipped(ratio_T: Tensor, advantage_T: Tensor, *, low: float, high: float) -> tuple[Tensor, Tensor]:
    clipped_T = ratio_T.clamp(1 - low, 1 + high)
    loss_T = -torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T)
    at_T = ratio_T.detach()
    return loss_T, ((advantage_T > 0) & (at_T > 1 + high)) | ((advantage_T < 0) & (at_T < 1 - low))


class PolicyReport(Record):
    """How far the policy had moved from the one that sampled, over some tokens of a step."""

    tokens: int
    mismatch_kl: float
    """Mean of R − 1 − log R (k3), an estimate of KL(μ‖π) in nats per token."""
    logp_difference: float
    """Mean |log π − log μ|."""
    logp_difference_max: float
    ratio_mean: float
    """Mean of R."""
    effective_samples: float
    """(Σ R)² / (T Σ R²): 1 on policy, towards 0 as few tokens carry the gradient."""
    masked_fraction: float
    entropy: float
    """Mean entropy of π in nats."""
    advantage_mean: float
    advantage_variance: float


def policy_report(
    *, logp_T: Tensor, behaviour_T: Tensor, entropy_T: Tensor, masked_T: Tensor, advantage_T: Tensor
) -> PolicyReport:
    """Figures over the T tokens given (T ≥ 1)."""
    log_ratio_T = (logp_T - behaviour_T).double()
    ratio_T = log_ratio_T.exp()
    advantage_T = advantage_T.double()
    return PolicyReport(
        tokens=len(logp_T),
        mismatch_kl=(ratio_T - 1 - log_ratio_T).mean().item(),
        logp_difference=log_ratio_T.abs().mean().item(),
        logp_difference_max=log_ratio_T.abs().max().item(),
        ratio_mean=ratio_T.mean().item(),
        effective_samples=(ratio_T.sum().square() / (len(ratio_T) * ratio_T.square().sum())).item(),
        masked_fraction=masked_T.double().mean().item(),
        entropy=entropy_T.double().mean().item(),
        advantage_mean=advantage_T.mean().item(),
        advantage_variance=advantage_T.var(correction=0).item(),
    )


def merged_policy(reports: Sequence[PolicyReport]) -> PolicyReport:
    """Figures over the tokens of all reports (one or more), from those over the tokens of each."""
    tokens = [report.tokens for report in reports]

    def mean(values: Iterable[float]) -> float:
        return sum(count * value for count, value in zip(tokens, values, strict=True)) / sum(tokens)

    ratio = mean(r.ratio_mean for r in reports)
    squares = mean(_over(r.ratio_mean * r.ratio_mean, r.effective_samples) for r in reports)
    advantage = mean(r.advantage_mean for r in reports)
    return PolicyReport(
        tokens=sum(tokens),
        mismatch_kl=mean(r.mismatch_kl for r in reports),
        logp_difference=mean(r.logp_difference for r in reports),
        logp_difference_max=max(r.logp_difference_max for r in reports),
        ratio_mean=ratio,
        effective_samples=_over(ratio * ratio, squares),
        masked_fraction=mean(r.masked_fraction for r in reports),
        entropy=mean(r.entropy for r in reports),
        advantage_mean=advantage,
        advantage_variance=mean(r.advantage_variance + (r.advantage_mean - advantage) ** 2 for r in reports),
    )


def _over(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
