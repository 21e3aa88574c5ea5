"""One training step: every micro-batch forward and backward, then the optimizer; a report says what happened."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from learner.trainer.head import ChunkLoss, score, score_and_backward
from learner.trainer.memory import peak_bytes, reset_peak
from learner.trainer.model import Policy
from learner.trainer.outliers import kept_tokens
from learner.trainer.pack import MicroBatch
from learner.trainer.ranks import ALONE, Ranks
from learner.trainer.reference import Reference
from learner.trainer.report import Pass, StepReport, effective_share, mean_reference_kl, role_reports, work_report
from learner.trainer.sharding import whole_head
from learner.trainer.update import Update, update
from matpo.config import Learner, Objective
from matpo.objective.chosen import token_loss
from matpo.objective.tokens import Tokens
from matpo.objective.trajectories import trajectory_drift


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


@dataclass(frozen=True, slots=True, eq=False)
class Fixed:
    """What the objective is given beside the policy, per micro-batch; empty where it does not need it."""

    reference: Sequence[Tensor] = ()
    """Log-probabilities of the reference model."""
    kept: Sequence[Tensor] = ()
    """The tokens that are no outliers of the step."""
    old: Sequence[Tensor] = ()
    """log π_old; empty at the first optimizer step, where π_old is the policy."""


def accumulate(policy: Policy, batches: Sequence[MicroBatch], objective: Objective, fixed: Fixed = Fixed()) -> Pass:
    """Set every parameter's `.grad` to the gradient of Σ w ℓ over the micro-batches."""
    for parameter in policy.parameters.values():
        parameter.grad = None
    done = Pass()
    for number, batch in enumerate(batches):
        done.masked.append(torch.empty_like(batch.behaviour_T, dtype=torch.bool))
        started = time.perf_counter()
        recompute = policy.recompute.needed(policy.work(batch).tokens)
        policy.play(batch.adapter)
        hidden_NE = policy.hidden(batch.tokens_N, batch.positions_N, batch.plan, recompute=recompute)
        middle = time.perf_counter()
        with whole_head(policy.head) as head:
            drift_T = None
            if objective.needs.trajectory:
                logp_T = score(head, hidden_NE, batch).logp_T
                drift_T = trajectory_drift(logp_T, batch.behaviour_T, batch.trajectory_T)
            loss = _chunk_loss(objective, batch, number, fixed, drift_T, done)
            scores, hidden_grad_NE = score_and_backward(head, hidden_NE, batch, loss)
        torch.autograd.backward(hidden_NE, hidden_grad_NE.to(hidden_NE.dtype))
        done.forward_s += middle - started
        done.backward_s += time.perf_counter() - middle
        done.recomputed += recompute
        done.logp.append(scores.logp_T)
        done.entropy.append(scores.entropy_T)
        done.slope.append(scores.slope_T)
    return done


def _chunk_loss(
    objective: Objective, batch: MicroBatch, number: int, fixed: Fixed, drift_T: Tensor | None, done: Pass
) -> ChunkLoss:
    """The weighted loss of any of the micro-batch's tokens; what it finds is added to `done`."""

    def loss(logp_T: Tensor, entropy_T: Tensor, at: slice) -> Tensor:
        def part(tensors: Sequence[Tensor]) -> Tensor | None:
            return tensors[number][at] if tensors else None

        terms = token_loss(
            objective,
            Tokens(
                logp_T=logp_T,
                behaviour_T=batch.behaviour_T[at],
                advantage_T=batch.advantage_T[at],
                old_logp_T=part(fixed.old),
                drift_T=None if drift_T is None else drift_T[at],
                kept_T=part(fixed.kept),
                entropy_T=entropy_T,
                reference_logp_T=part(fixed.reference),
            ),
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
    ranks: Ranks = ALONE,
) -> StepReport:
    """Take step `step` of `steps`: `optimizer_steps_per_batch` passes over the same micro-batches.

    `reference` is run once, and must be given if the objective has a `reference_kl`.
    """
    rate, objective = learning_rate(learner, step=step, steps=steps), learner.objective
    reset_peak(policy.device)
    clock = [time.perf_counter()]
    fixed = Fixed(
        reference=[] if reference is None else [reference(batch) for batch in batches],
        kept=kept_tokens(policy, batches, objective, ranks),
    )
    clock.append(time.perf_counter())
    passes: list[Pass] = []
    updates: list[Update] = []
    for number in range(learner.optimizer_steps_per_batch if batches else 0):
        if number and objective.needs.old_policy:
            fixed = replace(fixed, old=passes[0].logp)
        done = accumulate(policy, batches, objective, fixed)
        share = effective_share(batches, done, ranks) if learner.ess_guard else 1.0
        updates.append(
            update(policy, optimizer, rate=rate * math.sqrt(share), grad_clip=learner.grad_clip, ranks=ranks)
        )
        passes.append(done if not number else Pass(forward_s=done.forward_s, backward_s=done.backward_s))
    clock.append(time.perf_counter())
    optimizer.zero_grad(set_to_none=True)
    first = passes[0] if passes else Pass()
    forward_s, backward_s = sum(one.forward_s for one in passes), sum(one.backward_s for one in passes)
    return StepReport(
        **work_report(batches, policy).model_dump(),
        step=step,
        loss=first.loss,
        grad_norm=updates[0].grad_norm if updates else 0.0,
        gradient_cosine=updates[0].cosine if updates else None,
        lr=updates[0].rate if updates else rate,
        updates=sum(one.taken for one in updates),
        recomputed_micro_batches=first.recomputed,
        reference_s=clock[1] - clock[0],
        forward_s=forward_s,
        backward_s=backward_s,
        optimizer_s=clock[2] - clock[1] - forward_s - backward_s,
        peak_bytes=peak_bytes(policy.device),
        reference_kl=mean_reference_kl(first, fixed.reference),
        roles=dict(role_reports(batches, first)),
    )
