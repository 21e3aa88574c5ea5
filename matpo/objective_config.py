"""Config of the training objectives (formulas: docs/algorithm.md), what each needs, and the terms any may carry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from matpo.section import Section


@dataclass(frozen=True, slots=True)
class Needs:
    """What an objective looks at beside a token's own π, μ and A, and what that costs."""

    old_policy: bool = False
    """π_old. With one optimizer step per batch it is the current policy; with several the first one's is kept."""
    trajectory: bool = False
    """The mean log-ratio of the token's trajectory: the head's forward pass runs twice."""
    whole_step: bool = False
    """All tokens of the step at once: one forward pass before the first optimizer step."""


class Terms(Section):
    """What may be added to any objective. A term whose weight is 0 costs nothing."""

    own_needs: ClassVar[Needs] = Needs()
    """Of the objective without its terms."""

    reference_kl: float = Field(default=0.0, ge=0)
    """Weight of the k3 estimate of KL(π‖reference) at each sampled token; costs one more model in memory and one more
    forward pass a step."""
    reference: Path | None = None
    """Folder of the reference model; None: the model the run started from."""
    entropy_bonus: float = Field(default=0.0, ge=0)
    """Weight of the entropy of π at each sampled token, which is maximised."""
    sequence_mask: float | None = Field(default=None, gt=0)
    """Drop tokens with A < 0 of trajectories whose mean(log μ − log π) exceeds this many nats; None: keep all."""

    @model_validator(mode="after")
    def _reference_used(self) -> Terms:
        if self.reference is not None and not self.reference_kl:
            raise ValueError("reference has no effect while reference_kl is 0; give it a weight or remove it")
        return self

    @property
    def needs(self) -> Needs:
        """Of the objective with its terms."""
        own = self.own_needs
        return Needs(
            old_policy=own.old_policy,
            trajectory=own.trajectory or self.sequence_mask is not None,
            whole_step=own.whole_step,
        )


class Dppo(Terms):
    """Truncated importance weight, binary total-variation mask, squared log-ratio penalty (design §7)."""

    name: Literal["dppo"] = "dppo"
    delta: float = Field(default=0.2, gt=0, le=1)
    """Mask a token whose probability already moved this far in the direction the advantage pushes."""
    tau: float = Field(default=1e-3, ge=0)
    """Weight of (log π/μ)²."""
    ratio_cap: float = Field(default=2.0, gt=0)


class Clip(Terms):
    """PPO's clipped surrogate on π/μ with a dual clip (the MATPO paper's)."""

    name: Literal["clip"] = "clip"
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    clip_high: float = Field(default=0.2, gt=0)
    dual_clip: float = Field(default=3.0, gt=1)


class Decoupled(Terms):
    """Clipped surrogate on π/π_old, weighted by the truncated π_old/μ (AReaL)."""

    own_needs: ClassVar[Needs] = Needs(old_policy=True)
    name: Literal["decoupled"] = "decoupled"
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    clip_high: float = Field(default=0.2, gt=0)
    ratio_cap: float = Field(default=2.0, gt=0)


class Tis(Terms):
    """Policy gradient weighted by the truncated π/μ per token."""

    name: Literal["tis"] = "tis"
    ratio_cap: float = Field(default=2.0, gt=0)


class IcePop(Terms):
    """Policy gradient weighted by π/μ, without the tokens where that is outside a band."""

    name: Literal["icepop"] = "icepop"
    low: float = Field(default=0.5, ge=0, lt=1)
    high: float = Field(default=5.0, gt=1)


class Cispo(Terms):
    """Policy gradient weighted by the clipped π/μ; no token loses its gradient (MiniMax-M1)."""

    name: Literal["cispo"] = "cispo"
    clip_low: float = Field(default=1.0, gt=0, le=1)
    """1: no lower bound."""
    clip_high: float = Field(default=0.2, gt=0)


class Gspo(Terms):
    """Clipped surrogate on the geometric mean of π/μ over a trajectory."""

    own_needs: ClassVar[Needs] = Needs(trajectory=True)
    name: Literal["gspo"] = "gspo"
    clip_low: float = Field(default=0.01, gt=0, lt=1)
    """The paper has 3e-4 and 4e-4, against a policy a few updates old on the learner's own arithmetic."""
    clip_high: float = Field(default=0.01, gt=0)


class Topr(Terms):
    """Policy gradient; tokens with A < 0 are weighted by π/μ, at most 1."""

    name: Literal["topr"] = "topr"


class M2po(Terms):
    """Policy gradient weighted by π/μ, without the outliers that make the mean of (log π_old/μ)² too large."""

    own_needs: ClassVar[Needs] = Needs(whole_step=True)
    name: Literal["m2po"] = "m2po"
    threshold: float = Field(default=0.04, gt=0)
    """Largest mean of (log π_old/μ)² over the tokens of the step that stay."""


class Reinforce(Terms):
    """The plain policy gradient: no correction for staleness."""

    name: Literal["reinforce"] = "reinforce"


def _named(value: object) -> object:
    """Options of the default objective may be given without its name."""
    return {"name": Dppo().name, **value} if isinstance(value, dict) else value


Objective = Annotated[
    Dppo | Clip | Decoupled | Tis | IcePop | Cispo | Gspo | Topr | M2po | Reinforce,
    Field(discriminator="name"),
    BeforeValidator(_named),
]
