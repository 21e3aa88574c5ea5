"""Log-probabilities of the scored tokens, and the loss on them, without ever holding all logits.

The output projection runs over a few thousand scored tokens at a time; the loss is taken inside that chunk and its
gradient applied at once: three matrix products per chunk, float32 log-probabilities, entropy for free.
K: scored tokens, T: sampled tokens, V: vocabulary, E: hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.trainer.pack import MicroBatch

CHUNK_LOGITS = 1 << 23
"""Logits held at once: 32 MiB of float32, three times over at the peak."""

ChunkLoss = Callable[[Tensor, slice], Tensor]
"""(log π of some sampled tokens, differentiable; which of the T they are) → their weighted loss, a scalar."""


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """The output projection: V×E weight and optional V bias; float32 parameters unless frozen."""

    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None
    dtype: torch.dtype
    """Of the matrix products."""


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Per sampled token, float32 of shape T."""

    logp_T: Tensor
    entropy_T: Tensor
    """Of the distribution the token was drawn from, in nats."""


def score_and_backward(head: Head, hidden_NE: Tensor, batch: MicroBatch, loss: ChunkLoss) -> tuple[Scores, Tensor]:
    """Score the micro-batch's tokens, add the loss's gradient to the head's `.grad`, and return that of `hidden_NE`.

    A frozen head gets no gradient, and the time for it is saved.
    """
    hidden_grad_NE = torch.zeros_like(hidden_NE, dtype=torch.float32)
    for parameter in (head.weight, head.bias):
        if parameter is not None and parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    weight_VE = head.weight.detach().to(head.dtype)
    logp_T, entropy_T = torch.empty_like(batch.behaviour_T), torch.empty_like(batch.behaviour_T)
    for scored, sampled in _chunks(batch, len(weight_VE)):
        predictor, target = batch.predictor_K[scored], batch.target_K[scored, None]
        hidden_CE = hidden_NE.detach().index_select(0, predictor).to(head.dtype)
        logits_CV = (hidden_CE @ weight_VE.T).float()
        if head.bias is not None:
            logits_CV += head.bias.detach()
        logits_CV /= batch.temperature_K[scored, None]
        normaliser_C1 = logits_CV.logsumexp(dim=1, keepdim=True)
        logp_C = (logits_CV.gather(1, target) - normaliser_C1).squeeze(1).requires_grad_()
        probability_CV = (logits_CV - normaliser_C1).exp_()
        entropy_C = normaliser_C1.squeeze(1) - torch.linalg.vecdot(probability_CV, logits_CV)
        which = batch.scored_T[sampled] - scored.start
        with torch.enable_grad():
            chosen_T = logp_C[which]
            (slope_C,) = torch.autograd.grad(loss(chosen_T, sampled), logp_C)
        logp_T[sampled], entropy_T[sampled] = chosen_T.detach(), entropy_C[which]
        # d log π / d logits = onehot − p, divided by the temperature that scaled the logits.
        slope_C1 = (slope_C / batch.temperature_K[scored])[:, None]
        slope_CV = probability_CV.mul_(-slope_C1)
        slope_CV[torch.arange(len(target), device=target.device), target.squeeze(1)] += slope_C1.squeeze(1)
        grad_CV = slope_CV.to(head.dtype)
        hidden_grad_NE.index_add_(0, predictor, (grad_CV @ weight_VE).float())
        if head.weight.grad is not None:
            if head.dtype == torch.float32:
                head.weight.grad.addmm_(grad_CV.T, hidden_CE)
            else:
                head.weight.grad += grad_CV.T @ hidden_CE
        if head.bias is not None and head.bias.grad is not None:
            head.bias.grad += grad_CV.sum(dim=0)
    return Scores(logp_T, entropy_T), hidden_grad_NE


def _chunks(batch: MicroBatch, vocabulary: int) -> Iterator[tuple[slice, slice]]:
    """Consecutive scored tokens (as a slice of K) and the sampled tokens that share them (as a slice of T)."""
    size = max(1, CHUNK_LOGITS // vocabulary)
    starts = list(range(0, len(batch.target_K), size))
    bounds = torch.searchsorted(
        batch.scored_T, torch.tensor([*starts, len(batch.target_K)]).to(batch.scored_T)
    ).tolist()
    for number, start in enumerate(starts):
        yield slice(start, min(start + size, len(batch.target_K))), slice(bounds[number], bounds[number + 1])
