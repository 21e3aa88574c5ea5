"""What a training step did, as figures: tokens and arithmetic, memory and time, and how far the policy had moved."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from learner.trainer.costs import Work
from learner.trainer.model import Policy
from learner.trainer.pack import MicroBatch
from learner.trainer.ranks import Ranks
from matpo.objective.chosen import reference_kl
from matpo.objective.report import PolicyReport, merged_policy, policy_report
from protocols.records import Record


class WorkReport(Record):
    """The plan of a step. Arithmetic is that of one forward and backward pass over all of it (`ModelShape.flops`),
    recomputation not counted."""

    micro_batches: int
    tokens: int
    """Input tokens of the trained sequences."""
    unique_tokens: int
    """Of those, computed once each."""
    padded_tokens: int
    """Had nothing been shared and every sequence been padded to the longest of its eight."""
    computed_tokens: int
    """Tokens the model ran on: the unique ones, or, where prefixes are not shared, all of them with their padding."""
    sampled_tokens: int
    scored_tokens: int
    """Distinct (prefix, sampled token) pairs the head computed."""
    flops: int
    """As computed."""
    packed_flops: int
    """Had nothing been shared, without padding."""
    padded_flops: int
    """Had nothing been shared, with padding."""


class StepReport(WorkReport):
    """One step. Figures of the policy are those before its first optimizer step."""

    step: int
    loss: float
    """Σ w ℓ over the step's sampled tokens."""
    grad_norm: float
    """Before clipping, of the first optimizer step."""
    gradient_cosine: float | None
    """Of the gradient with the running mean of those before it (Adam's first moment)."""
    lr: float
    """Of the first optimizer step."""
    updates: int
    """Optimizer steps taken; fewer than configured when a gradient was not finite or nothing was sampled."""
    recomputed_micro_batches: int
    """Whose activations did not fit, so that layers were computed twice."""
    reference_s: float
    """Forward passes of the reference model."""
    forward_s: float
    backward_s: float
    """Head included."""
    optimizer_s: float
    peak_bytes: int
    """Most memory at once during the step: tensors on a GPU, otherwise all the trainer has resident."""
    reference_kl: float | None
    """Mean k3 estimate of KL(π‖reference) in nats per sampled token, where the objective has that term."""
    roles: dict[str, PolicyReport]

    def to_json(self) -> bytes:
        """For another rank; unlike pydantic's own it keeps figures that are not finite."""
        return json.dumps(self.model_dump()).encode()

    @classmethod
    def from_json(cls, content: bytes) -> StepReport:
        """What `to_json` gave."""
        return cls.model_validate(json.loads(content))


def merged(reports: Sequence[StepReport]) -> StepReport:
    """The report of a step from those of its ranks, each of its own micro-batches."""
    if len(reports) == 1:
        return reports[0]
    figures = [report.model_dump(exclude={"gradient_cosine", "reference_kl", "roles"}) for report in reports]
    summed = {"loss", "recomputed_micro_batches", *WorkReport.model_fields}
    # The others are the same on all ranks, or the slowest and the fullest rank counts.
    whole = {name: (sum if name in summed else max)(one[name] for one in figures) for name in figures[0]}
    apart = [(r.reference_kl, r.sampled_tokens) for r in reports if r.reference_kl is not None and r.sampled_tokens]
    roles = sorted({role for report in reports for role in report.roles})
    return StepReport(
        **whole,
        gradient_cosine=reports[0].gradient_cosine,
        reference_kl=sum(kl * n for kl, n in apart) / sum(n for _, n in apart) if apart else None,
        roles={role: merged_policy([r.roles[role] for r in reports if role in r.roles]) for role in roles},
    )


@dataclass(slots=True)
class Pass:
    """What one pass over the micro-batches adds up to; lists have one entry per micro-batch."""

    loss: float = 0.0
    logp: list[Tensor] = field(default_factory=list)
    entropy: list[Tensor] = field(default_factory=list)
    masked: list[Tensor] = field(default_factory=list)
    slope: list[Tensor] = field(default_factory=list)
    recomputed: int = 0
    forward_s: float = 0.0
    backward_s: float = 0.0


def work_report(batches: Sequence[MicroBatch], policy: Policy) -> WorkReport:
    """Of one pass over some micro-batches."""
    shape = policy.shape
    unique = sum((batch.computed for batch in batches), Work())
    computed = sum((policy.work(batch) for batch in batches), Work())
    packed = sum((batch.packed for batch in batches), Work())
    padded = sum((batch.padded for batch in batches), Work())
    return WorkReport(
        micro_batches=len(batches),
        tokens=packed.tokens,
        unique_tokens=unique.tokens,
        padded_tokens=padded.tokens,
        computed_tokens=computed.tokens,
        sampled_tokens=packed.scored,
        scored_tokens=computed.scored,
        flops=shape.flops(computed),
        packed_flops=shape.flops(packed),
        padded_flops=shape.flops(padded),
    )


def effective_share(batches: Sequence[MicroBatch], done: Pass, ranks: Ranks) -> float:
    """(Σ R)² / (T Σ R²) over the sampled tokens of all ranks; 1 without any."""
    ratios = [(logp_T - batch.behaviour_T).double().exp() for logp_T, batch in zip(done.logp, batches, strict=True)]
    own = [sum(values) for values in zip(*((len(r), r.sum().item(), r.square().sum().item()) for r in ratios),
                                         strict=True)] or [0.0] * 3  # fmt: skip
    count, total, squares = ranks.total(own)
    return total * total / (count * squares) if count and squares else 1.0


def mean_reference_kl(done: Pass, reference: Sequence[Tensor]) -> float | None:
    """Of all sampled tokens, given the reference's log-probabilities per micro-batch; None without them."""
    if not reference:
        return None
    return reference_kl(torch.cat(done.logp), torch.cat(list(reference))).double().mean().item()


def role_reports(batches: Sequence[MicroBatch], first: Pass) -> Iterator[tuple[str, PolicyReport]]:
    """Per role that has sampled tokens, the figures over them."""
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
                slope_T=torch.cat([x[m] for x, m in zip(first.slope, at, strict=True)]),
            ),
        )
