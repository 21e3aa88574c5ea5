"""Config of the training objectives (formulas: docs/algorithm.md) and of the terms any of them may carry."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from matpo.section import Section


class Terms(Section):
    """What may be added to any objective. A term whose weight is 0 costs nothing."""

    reference_kl: float = Field(default=0.0, ge=0)
    """Weight of the k3 estimate of KL(π‖reference) at each sampled token; costs one more model in memory and one more
    forward pass a step."""
    reference: Path | None = None
    """Folder of the reference model; None: the model the run started from."""
    entropy_bonus: float = Field(default=0.0, ge=0)
    """Weight of the entropy of π at each sampled token, which is maximised."""

    @model_validator(mode="after")
    def _reference_used(self) -> Terms:
        if self.reference is not None and not self.reference_kl:
            raise ValueError("reference has no effect while reference_kl is 0; give it a weight or remove it")
        return self


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

    name: Literal["decoupled"] = "decoupled"
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    clip_high: float = Field(default=0.2, gt=0)
    ratio_cap: float = Field(default=2.0, gt=0)


class Tis(Terms):
    """Policy gradient weighted by the truncated π/μ per token."""

    name: Literal["tis"] = "tis"
    ratio_cap: float = Field(default=2.0, gt=0)


Objective = Annotated[Dppo | Clip | Decoupled | Tis, Field(discriminator="name")]
