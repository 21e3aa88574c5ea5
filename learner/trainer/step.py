"""One training step: every micro-batch forward and backward, then the optimizer; a report says what happened."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from learner.trainer.head import ChunkLoss, score_and_backward
from learner.trainer.memory import peak_bytes, reset_peak
from learner.trainer.model import Policy
from learner.trainer.pack import MicroBatch
from learner.trainer.reference import Reference
from learner.trainer.report import Pass, StepReport, mean_reference_kl, role_reports, work_report
from learner.trainer.sharding import whole_head
from matpo.config import Learner, Objective
from matpo.objective import needs_old_policy, token_loss


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


def accumulate(
    policy: Policy,
    batches: Sequence[MicroBatch],
    objective: Objective,
    *,
    old: Pass | None = None,
    reference: Sequence[Tensor] = (),
) -> Pass:
    """Set every parameter's `.grad` to the gradient of Σ w ℓ over the micro-batches.

    `old` is the pass at the start of the step, whose log-probabilities are π_old; None when this is that pass.
    `reference` holds those of the reference model, per micro-batch, if the objective asks for one.
    """
    for parameter in policy.parameters.values():
        parameter.grad = None
    done = Pass()
    for number, batch in enumerate(batches):
        done.masked.append(torch.empty_like(batch.behaviour_T, dtype=torch.bool))
        loss = _chunk_loss(
            objective,
            batch,
            old_T=None if old is None else old.logp[number],
            reference_T=reference[number] if reference else None,
            done=done,
        )
        started = time.perf_counter()
        recompute = policy.recompute.needed(batch.computed.tokens)
        hidden_NE = policy.hidden(batch.tokens_N, batch.positions_N, batch.plan, recompute=recompute)
        middle = time.perf_counter()
        with whole_head(policy.head) as head:
            scores, hidden_grad_NE = score_and_backward(head, hidden_NE, batch, loss)
        torch.autograd.backward(hidden_NE, hidden_grad_NE.to(hidden_NE.dtype))
        done.forward_s += middle - started
        done.backward_s += time.perf_counter() - middle
        done.recomputed += recompute
        done.logp.append(scores.logp_T)
        done.entropy.append(scores.entropy_T)
    return done


def _chunk_loss(
    objective: Objective, batch: MicroBatch, *, old_T: Tensor | None, reference_T: Tensor | None, done: Pass
) -> ChunkLoss:
    """The weighted loss of any of the micro-batch's tokens; what it finds is added to `done`."""

    def loss(logp_T: Tensor, entropy_T: Tensor, at: slice) -> Tensor:
        terms = token_loss(
            objective,
            logp_T,
            old_logp_T=None if old_T is None else old_T[at],
            behaviour_T=batch.behaviour_T[at],
            advantage_T=batch.advantage_T[at],
            entropy_T=entropy_T,
            reference_logp_T=None if reference_T is None else reference_T[at],
        )
        done.masked[-1][at] = terms.masked_T
        total = (batch.weight_T[at] * terms.loss_T).sum()
        done.loss += total.item()
        return total

    return loss


def train_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[MicroBatch],
    learner: Learner,
    *,
    step: int,
    steps: int,
    reference: Reference | None = None,
) -> StepReport:
    """Take step `step` of `steps`: `optimizer_steps_per_batch` passes over the same micro-batches.

    `reference` is run once, and must be given if the objective has a `reference_kl`.

    An update whose gradient is not finite is skipped, so one broken step cannot ruin the weights.
    """
    rate = learning_rate(learner, step=step, steps=steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    reset_peak(policy.device)
    clock = [time.perf_counter()]
    fixed = [] if reference is None else [reference(batch) for batch in batches]
    clock.append(time.perf_counter())
    first, norm, updates, forward_s, backward_s = Pass(), 0.0, 0, 0.0, 0.0
    for number in range(learner.optimizer_steps_per_batch if batches else 0):
        old = first if number and needs_old_policy(learner.objective) else None
        done = accumulate(policy, batches, learner.objective, old=old, reference=fixed)
        parameters = [p for p in policy.parameters.values() if p.grad is not None]
        found = torch.nn.utils.clip_grad_norm_(parameters, learner.grad_clip).item()
        if math.isfinite(found):
            optimizer.step()
            updates += 1
        forward_s, backward_s = forward_s + done.forward_s, backward_s + done.backward_s
        if not number:
            first, norm = done, found
    clock.append(time.perf_counter())
    optimizer.zero_grad(set_to_none=True)
    return StepReport(
        **work_report(batches, policy).model_dump(),
        step=step,
        loss=first.loss,
        grad_norm=norm,
        lr=rate,
        updates=updates,
        recomputed_micro_batches=first.recomputed,
        reference_s=clock[1] - clock[0],
        forward_s=forward_s,
        backward_s=backward_s,
        optimizer_s=clock[2] - clock[1] - forward_s - backward_s,
        peak_bytes=peak_bytes(policy.device),
        reference_kl=mean_reference_kl(first, fixed),
        roles=dict(role_reports(batches, first)),
    )
