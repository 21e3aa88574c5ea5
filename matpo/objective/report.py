"""How far the policy had moved from the one that sampled: the figures that say whether a step was sound."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from protocols.records import Record


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
    gradient: float
    """Σ |∂L/∂log π|; of the sum over roles, a role's part is its share of the gradient."""


def policy_report(
    *,
    logp_T: Tensor,
    behaviour_T: Tensor,
    entropy_T: Tensor,
    masked_T: Tensor,
    advantage_T: Tensor,
    slope_T: Tensor,
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
        gradient=slope_T.double().abs().sum().item(),
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
        gradient=sum(r.gradient for r in reports),
    )


def _over(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
