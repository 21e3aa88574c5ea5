"""One optimizer step on the gradients that were summed up, and what can be said of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from learner.trainer.model import Policy
from learner.trainer.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Update:
    """What one optimizer step did."""

    grad_norm: float
    """Before clipping."""
    cosine: float | None
    """Of the gradient with Adam's mean of those before it; None at the first step."""
    rate: float
    taken: bool


def update(policy: Policy, optimizer: torch.optim.Optimizer, *, rate: float, grad_clip: float, ranks: Ranks) -> Update:
    """Clip and step. An update whose gradient is not finite is skipped, so one broken step cannot ruin the weights."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    parameters = [p for p in policy.parameters.values() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip).item()
    taken = math.isfinite(norm)
    cosine = momentum_cosine(optimizer, parameters, ranks) if taken else None
    if taken:
        optimizer.step()
    return Update(grad_norm=norm, cosine=cosine, rate=rate, taken=taken)


def momentum_cosine(
    optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], ranks: Ranks
) -> float | None:
    """Cosine between the gradient and Adam's first moment, the running mean of the gradients before it.

    Asynchronous training that is about to diverge keeps pushing the same way (GAC, arXiv 2603.01501, compares
    consecutive gradients); the moment is in memory already and less noisy than the last gradient alone.
    """
    products, gradients, moments = 0.0, 0.0, 0.0
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        if "exp_avg" in state and parameter.grad is not None:
            gradient, moment = _local(parameter.grad), _local(state["exp_avg"])
            products += float(torch.sum(gradient * moment))
            gradients += float(gradient.square().sum())
            moments += float(moment.square().sum())
    product, gradient_square, moment_square = ranks.total([products, gradients, moments])
    scale = math.sqrt(gradient_square * moment_square)
    return product / scale if scale else None


def _local(tensor: Tensor) -> Tensor:
    """This rank's part, flat."""
    part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part.reshape(-1)
