"""Log-probabilities of the scored tokens, and the loss on them, without ever holding all logits.

The output projection runs over some hundred scored tokens at a time; the loss is taken inside that chunk and its
gradient applied at once: three matrix products per chunk, float32 log-probabilities, entropy for free.
K: scored tokens, C: those of a chunk, T: sampled tokens, V: vocabulary, E: hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from learner.trainer.memory import total_bytes
from learner.trainer.pack import MicroBatch
from matpo.errors import UserError

MEMORY_SHARE = 128
"""Logits take at most one part in so many of the device's whole memory (not of what is free now: the chunk decides the
order of sums, and a replay must sum in the same order)."""
BUFFERS = 2
"""Float32 tensors of a chunk's logits alive at once."""
LEAST_ROWS = 32
"""Below this the products are slower than the memory is worth."""

ChunkLoss = Callable[[Tensor, Tensor, slice], Tensor]
"""(log π of some sampled tokens, entropy of π there, which of the T they are) → their weighted loss, a scalar.
Differentiable in both."""


def output_projection(model: PreTrainedModel) -> torch.nn.Linear:
    """The layer that makes logits of hidden states. Raises `UserError` for a model that has none."""
    layer: object = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers leaves it bare
    if not isinstance(layer, torch.nn.Linear):
        raise UserError(
            f"model {type(model).__name__} has no linear output projection and cannot be trained;"
            " give the folder of a Hugging Face causal model"
        )
    return layer


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """The output projection: V×E weight and optional V bias; float32 parameters unless frozen."""

    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None
    dtype: torch.dtype
    """Of the matrix products."""

    @classmethod
    def of(cls, projection: torch.nn.Linear, dtype: torch.dtype) -> Head:
        """The parameters a module holds now."""
        weight, bias = projection.weight, projection.bias
        return cls(weight, bias, dtype)  # type: ignore[arg-type]  # Linear declares Tensor, holds Parameters


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Per sampled token, float32 of shape T."""

    logp_T: Tensor
    entropy_T: Tensor
    """Of the distribution the token was drawn from, in nats."""
    slope_T: Tensor
    """Derivative of the weighted loss in log π; 0 where no loss was taken."""

    @classmethod
    def empty(cls, batch: MicroBatch) -> Scores:
        """To be filled in."""
        return cls(*(torch.zeros_like(batch.behaviour_T) for _ in range(3)))


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Scored tokens of a chunk: the power of two whose logits fit into the device's `MEMORY_SHARE`."""
    fitting = total_bytes(device) // MEMORY_SHARE // (BUFFERS * 4 * vocabulary)
    return max(LEAST_ROWS, 1 << fitting.bit_length() - 1 if fitting else 0)


def score(head: Head, hidden_NE: Tensor, batch: MicroBatch) -> Scores:
    """Score the micro-batch's tokens; no gradient."""
    scores = Scores.empty(batch)
    with torch.no_grad():
        for chunk in _chunks(head, hidden_NE, batch):
            scores.logp_T[chunk.sampled] = chunk.logp_C[chunk.which]
            scores.entropy_T[chunk.sampled] = chunk.entropy_C[chunk.which]
    return scores


def score_and_backward(head: Head, hidden_NE: Tensor, batch: MicroBatch, loss: ChunkLoss) -> tuple[Scores, Tensor]:
    """Score the micro-batch's tokens, add the loss's gradient to the head's `.grad`, and return that of `hidden_NE`.

    A frozen head gets no gradient, and the time for it is saved.
    """
    hidden_grad_NE = torch.zeros_like(hidden_NE, dtype=torch.float32)
    weight_grad_VE, bias_grad_V = _grad(head.weight), None if head.bias is None else _grad(head.bias)
    scores = Scores.empty(batch)
    for chunk in _chunks(head, hidden_NE, batch):
        grad_CV = _logit_gradient(chunk, loss, scores).to(head.dtype)
        hidden_grad_NE.index_add_(0, chunk.predictor_C, (grad_CV @ chunk.weight_VE).float())
        if weight_grad_VE is not None:
            _add_product(weight_grad_VE, grad_CV.T, chunk.hidden_CE)
        if bias_grad_V is not None:
            bias_grad_V += grad_CV.sum(dim=0)
    return scores, hidden_grad_NE


def _grad(parameter: torch.nn.Parameter) -> Tensor | None:
    """Where its gradient is summed up; None if it is frozen."""
    if parameter.requires_grad and parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _add_product(total_VE: Tensor, left_VC: Tensor, right_CE: Tensor) -> None:
    """In float32 without a tensor for the product."""
    if left_VC.dtype == total_VE.dtype:
        total_VE.addmm_(left_VC, right_CE)
    else:
        total_VE += left_VC @ right_CE


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    """Some consecutive scored tokens. The two tensors of logits are reused by the next chunk."""

    weight_VE: Tensor
    hidden_CE: Tensor
    predictor_C: Tensor
    target_C: Tensor
    temperature_C: Tensor
    log_probability_CV: Tensor
    probability_CV: Tensor
    logp_C: Tensor
    entropy_C: Tensor
    sampled: slice
    """Of the T."""
    which: Tensor
    """Which scored token of the chunk each of those sampled tokens is."""


def _chunks(head: Head, hidden_NE: Tensor, batch: MicroBatch) -> Iterator[_Chunk]:
    weight_VE, hidden_NE = head.weight.detach().to(head.dtype), hidden_NE.detach()
    count, vocabulary = len(batch.target_K), len(weight_VE)
    rows = min(chunk_rows(vocabulary, hidden_NE.device), count)
    if not count:
        return
    starts = range(0, count, rows)
    ends = [*starts[1:], count]
    edges = torch.tensor([0, *ends], device=batch.scored_T.device)
    bounds = torch.searchsorted(batch.scored_T, edges).tolist()
    buffers = [hidden_NE.new_empty(rows, vocabulary, dtype=torch.float32) for _ in range(BUFFERS)]
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        predictor_C, target_C = batch.predictor_K[start:end], batch.target_K[start:end]
        hidden_CE = hidden_NE.index_select(0, predictor_C).to(head.dtype)
        logits_CV, probability_CV = (buffer[: end - start] for buffer in buffers)
        if head.dtype == torch.float32:
            torch.mm(hidden_CE, weight_VE.T, out=logits_CV)
        else:
            logits_CV.copy_(hidden_CE @ weight_VE.T)
        if head.bias is not None:
            logits_CV += head.bias.detach()
        temperature_C = batch.temperature_K[start:end]
        logits_CV /= temperature_C[:, None]
        logits_CV -= logits_CV.amax(dim=1, keepdim=True)
        normaliser_C1 = torch.exp(logits_CV, out=probability_CV).sum(dim=1, keepdim=True)
        probability_CV /= normaliser_C1
        logits_CV -= normaliser_C1.log()
        sampled = slice(bounds[number], bounds[number + 1])
        yield _Chunk(
            weight_VE=weight_VE,
            hidden_CE=hidden_CE,
            predictor_C=predictor_C,
            target_C=target_C,
            temperature_C=temperature_C,
            log_probability_CV=logits_CV,
            probability_CV=probability_CV,
            logp_C=logits_CV.gather(1, target_C[:, None]).squeeze(1),
            entropy_C=-torch.linalg.vecdot(probability_CV, logits_CV),
            sampled=sampled,
            which=batch.scored_T[sampled] - start,
        )


def _logit_gradient(chunk: _Chunk, loss: ChunkLoss, scores: Scores) -> Tensor:
    """Gradient of the chunk's loss in its logits, before the temperature scaled them; overwrites the probabilities.

    z: logits after the temperature. ∂ log π(y) / ∂z_v = [v = y] − π(v); ∂ H / ∂z_v = −π(v) (log π(v) + H).
    """
    with torch.enable_grad():
        logp_T, entropy_T = (one_C[chunk.which].requires_grad_() for one_C in (chunk.logp_C, chunk.entropy_C))
        total = loss(logp_T, entropy_T, chunk.sampled)
        slope_T, bonus_T = torch.autograd.grad(total, (logp_T, entropy_T), allow_unused=True)
    scores.logp_T[chunk.sampled], scores.entropy_T[chunk.sampled] = logp_T.detach(), entropy_T.detach()
    scores.slope_T[chunk.sampled] = slope_T

    def summed(one_T: Tensor) -> Tensor:
        """Over the sampled tokens that share a scored one, in terms of logits."""
        return torch.zeros_like(chunk.logp_C).index_add_(0, chunk.which, one_T) / chunk.temperature_C

    slope_C = summed(slope_T)
    if bonus_T is None:
        grad_CV = chunk.probability_CV.mul_(-slope_C[:, None])
    else:
        factor_CV = chunk.log_probability_CV.add_(chunk.entropy_C[:, None])
        factor_CV.mul_(summed(bonus_T)[:, None]).add_(slope_C[:, None])
        grad_CV = chunk.probability_CV.mul_(factor_CV.neg_())
    grad_CV[torch.arange(len(slope_C), device=grad_CV.device), chunk.target_C] += slope_C
    return grad_CV
