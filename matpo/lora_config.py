"""What is trained when not all weights are: low-rank adapters."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, field_validator

from matpo.section import Section

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)


class Lora(Section):
    """Low-rank adapters: A and B of W + (alpha / rank) · B A are trained, everything else is frozen."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    target_modules: tuple[Projection, ...] = PROJECTIONS
    """Projections of every layer that are adapted."""
    publish: Literal["adapter", "merged"] = "adapter"
    """What travels to the engines: A and B, or all weights with B·A added in, which any engine takes as it is."""

    @field_validator("target_modules")
    @classmethod
    def _named_once(cls, value: tuple[Projection, ...]) -> tuple[Projection, ...]:
        if not value or len(set(value)) < len(value):
            raise ValueError("target_modules must name at least one projection, and none twice")
        return value
