"""One training step: every micro-batch forward and backward, then the optimizer; a report says what happened."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from learner.trainer.head import score_and_backward
from learner.trainer.model import Policy
from learner.trainer.pack import MicroBatch
from matpo.config import Learner, Objective
from matpo.objective import PolicyReport, needs_old_policy, policy_report, token_loss
from protocols.records import Record


class StepReport(Record):
    """One step. Figures of the policy are those before its first optimizer step."""

    step: int
    loss: float
    """Σ w ℓ over the step's sampled tokens."""
    grad_norm: float
    """Before clipping, of the first optimizer step."""
    lr: float
    updates: int
    """Optimizer steps taken; fewer than configured when a gradient was not finite or nothing was sampled."""
    micro_batches: int
    tokens: int
    """Input tokens of the trained sequences."""
    unique_tokens: int
    """Of those, computed once each."""
    attended_tokens: int
    """Tokens attention ran over, its padding included."""
    sampled_tokens: int
    scored_tokens: int
    """Distinct (prefix, sampled token) pairs the head computed."""
    forward_s: float
    backward_s: float
    """Head included."""
    optimizer_s: float
    roles: dict[str, PolicyReport]


def learning_rate(learner: Learner, *, step: int, steps: int) -> float:
    """Rate of step 1 … `steps`: linear warm-up, then constant or a half cosine that reaches 0 one step past the end."""
    if step <= learner.warmup_steps:
        return learner.lr * step / (learner.warmup_steps + 1)
    if learner.lr_schedule == "constant":
        return learner.lr
    progress = (step - learner.warmup_steps - 1) / max(1, steps - learner.warmup_steps)
    return learner.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def make_optimizer(policy: Policy, learner: Learner) -> torch.optim.AdamW:
    """AdamW over all parameters; weight decay on matrices only."""
    matrices = [p for p in policy.parameters.values() if p.ndim >= 2]
    vectors = [p for p in policy.parameters.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": learner.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learner.lr, betas=(learner.adam_beta1, learner.adam_beta2), fused=True)


@dataclass(slots=True)
class _Pass:
    """What one pass over the micro-batches adds up to; lists have one entry per micro-batch."""

    loss: float = 0.0
    logp: list[Tensor] = field(default_factory=list)
    entropy: list[Tensor] = field(default_factory=list)
    masked: list[Tensor] = field(default_factory=list)
    forward_s: float = 0.0
    backward_s: float = 0.0


def accumulate(policy: Policy, batches: Sequence[MicroBatch], objective: Objective, old: _Pass | None = None) -> _Pass:
    """Set every parameter's `.grad` to the gradient of Σ w ℓ over the micro-batches.

    `old` is the pass at the start of the step, whose log-probabilities are π_old; None when this is that pass.
    """
    for parameter in policy.parameters.values():
        parameter.grad = None
    done = _Pass()
    for number, batch in enumerate(batches):
        masked_T = torch.empty_like(batch.behaviour_T, dtype=torch.bool)

        def loss(logp_T: Tensor, at: slice, number: int = number, batch: MicroBatch = batch, masked_T: Tensor = masked_T
        ) -> Tensor:  # fmt: skip
            terms = token_loss(
                objective,
                logp_T,
                old_logp_T=None if old is None else old.logp[number][at],
                behaviour_T=batch.behaviour_T[at],
                advantage_T=batch.advantage_T[at],
            )
            masked_T[at] = terms.masked_T
            total = (batch.weight_T[at] * terms.loss_T).sum()
            done.loss += total.item()
            return total

        started = time.perf_counter()
        hidden_NE = policy.hidden(batch.tokens_N, batch.positions_N, batch.plan)
        middle = time.perf_counter()
        scores, hidden_grad_NE = score_and_backward(policy.head, hidden_NE, batch, loss)
        torch.autograd.backward(hidden_NE, hidden_grad_NE.to(hidden_NE.dtype))
        done.forward_s += middle - started
        done.backward_s += time.perf_counter() - middle
        done.logp.append(scores.logp_T)
        done.entropy.append(scores.entropy_T)
        done.masked.append(masked_T)
    return done


def train_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[MicroBatch],
    learner: Learner,
    *,
    step: int,
    steps: int,
) -> StepReport:
    """Take step `step` of `steps`: `optimizer_steps_per_batch` passes over the same micro-batches.

    An update whose gradient is not finite is skipped, so one broken step cannot ruin the weights.
    """
    rate = learning_rate(learner, step=step, steps=steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    first = _Pass()
    updates, norm, forward_s, backward_s, optimizer_s = 0, 0.0, 0.0, 0.0, 0.0
    for number in range(learner.optimizer_steps_per_batch if batches else 0):
        old = first if number and needs_old_policy(learner.objective) else None
        done = accumulate(policy, batches, learner.objective, old)
        started = time.perf_counter()
        parameters = [p for p in policy.parameters.values() if p.grad is not None]
        found = torch.nn.utils.clip_grad_norm_(parameters, learner.grad_clip).item()
        if math.isfinite(found):
            optimizer.step()
            updates += 1
        optimizer_s += time.perf_counter() - started
        forward_s, backward_s = forward_s + done.forward_s, backward_s + done.backward_s
        if not number:
            first, norm = done, found
    optimizer.zero_grad(set_to_none=True)
    return StepReport(
        step=step,
        loss=first.loss,
        grad_norm=norm,
        lr=rate,
        updates=updates,
        micro_batches=len(batches),
        tokens=sum(b.packed.tokens for b in batches),
        unique_tokens=sum(len(b.tokens_N) for b in batches),
        attended_tokens=sum(b.plan.rows for b in batches),
        sampled_tokens=sum(len(b.scored_T) for b in batches),
        scored_tokens=sum(len(b.target_K) for b in batches),
        forward_s=forward_s,
        backward_s=backward_s,
        optimizer_s=optimizer_s,
        roles=dict(_role_reports(batches, first)),
    )


def _role_reports(batches: Sequence[MicroBatch], first: _Pass) -> Iterator[tuple[str, PolicyReport]]:
    for role in sorted({role for batch in batches for role in batch.roles}):
        at = [
            b.role_T == b.roles.index(role) if role in b.roles else torch.zeros_like(b.role_T).bool() for b in batches
        ]
        yield (
            role,
            policy_report(
                logp_T=torch.cat([x[m] for x, m in zip(first.logp, at, strict=True)]),
                behaviour_T=torch.cat([b.behaviour_T[m] for b, m in zip(batches, at, strict=True)]),
                entropy_T=torch.cat([x[m] for x, m in zip(first.entropy, at, strict=True)]),
                masked_T=torch.cat([x[m] for x, m in zip(first.masked, at, strict=True)]),
                advantage_T=torch.cat([b.advantage_T[m] for b, m in zip(batches, at, strict=True)]),
            ),
        )
