"""Draw tokens from logits and say how likely each was under exactly the distribution it was drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from matpo.config import Sampling

BELOW_ONE = 1 - 2.0**-50


@dataclass(frozen=True, slots=True, eq=False)
class SamplingRows:
    """The sampling settings of B rows as tensors, and which of the slower paths they need."""

    inverse_temperature: torch.Tensor
    """[B, 1]; 1 for greedy rows."""
    greedy: torch.Tensor
    """[B] bool"""
    top_k: torch.Tensor
    """[B, 1]; the vocabulary size where unlimited."""
    top_p: torch.Tensor
    """[B, 1]"""
    any_greedy: bool
    any_filter: bool

    @classmethod
    def of(cls, settings: Sequence[Sampling], *, vocabulary: int, device: torch.device) -> SamplingRows:
        """Stack the settings of the running rows."""
        greedy = [s.temperature == 0 for s in settings]
        return cls(
            inverse_temperature=torch.tensor([[1.0 / (s.temperature or 1.0)] for s in settings], device=device),
            greedy=torch.tensor(greedy, device=device),
            top_k=torch.tensor([[s.top_k or vocabulary] for s in settings], device=device),
            top_p=torch.tensor([[s.top_p] for s in settings], dtype=torch.float64, device=device),
            any_greedy=any(greedy),
            any_filter=any(_filters(s, vocabulary) for s in settings),
        )


def _filters(sampling: Sampling, vocabulary: int) -> bool:
    return sampling.temperature > 0 and (0 < sampling.top_k < vocabulary or sampling.top_p < 1)


def sample(
    logits_BV: torch.Tensor, rows: SamplingRows, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B] and their log-probabilities [B] (float32).

    The log-probability is that of the behaviour distribution: after temperature, then top-k, then top-p over what
    top-k left, renormalised. A greedy row (temperature 0) takes the most likely token and reports its log-probability
    at temperature 1, unfiltered: under its own point mass it would always be log 1 = 0, which says nothing. Greedy
    rows serve evaluation only and are never trained on.
    """
    logp_BV = torch.log_softmax(logits_BV.float() * rows.inverse_temperature, dim=-1)
    drawn_BV = _filter(logp_BV, rows) if rows.any_filter else logp_BV
    # Inverse of the cumulative distribution in float64: the first entry above u·total has positive probability. The
    # factor keeps u·total below the total whatever the rounding.
    cumulative_BV = drawn_BV.exp().cumsum(dim=-1, dtype=torch.float64)
    total_B1 = cumulative_BV[:, -1:]
    u_B1 = torch.rand(total_B1.shape, generator=generator, dtype=torch.float64, device=logits_BV.device)
    token_B1 = torch.searchsorted(cumulative_BV, u_B1 * total_B1 * BELOW_ONE, right=True)
    token_B1.clamp_(max=logits_BV.shape[1] - 1)  # only where logits are no numbers; the log-probability then is none
    if rows.any_greedy:
        token_B1 = torch.where(rows.greedy[:, None], logp_BV.argmax(dim=-1, keepdim=True), token_B1)
        drawn_BV = torch.where(rows.greedy[:, None], logp_BV, drawn_BV) if rows.any_filter else logp_BV
    return token_B1[:, 0], drawn_BV.gather(1, token_B1)[:, 0]


def _filter(logp_BV: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Log-probabilities with everything outside top-k and top-p at -inf, renormalised."""
    sorted_BV, order_BV = logp_BV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(logp_BV.shape[1], device=logp_BV.device)
    within_k_BV = rank_V < rows.top_k
    p_BV = torch.where(within_k_BV, sorted_BV.exp().double(), 0.0)
    p_BV /= p_BV.sum(dim=-1, keepdim=True)
    # A token stays while the ones before it do not yet reach top_p, so the first always stays.
    kept_BV = within_k_BV & ((p_BV.cumsum(dim=-1) - p_BV < rows.top_p) | (rows.top_p >= 1))
    kept_BV = torch.empty_like(kept_BV).scatter_(1, order_BV, kept_BV)
    return torch.log_softmax(logp_BV.masked_fill(~kept_BV, float("-inf")), dim=-1)
