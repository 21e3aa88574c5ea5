"""What is trained when not all weights are: low-rank adapters."""

from __future__ import annotations

import re
from typing import Literal, get_args

from pydantic import Field, field_validator, model_validator

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

    roles: dict[str, Literal["shared", "own", "frozen"]] = Field(default={})
    """Who plays each role: the adapter that all `shared` ones train together, one of its `own`, or the model as it
    started, `frozen`: nothing of the role's tokens is trained. Empty: all are shared."""

    @model_validator(mode="after")
    def _each_can_be_served(self) -> Lora:
        odd = sorted(name for name in self.own if not re.fullmatch(r"[A-Za-z0-9_]+", name))
        if odd:
            raise ValueError(f"model.lora.roles: {odd} cannot name an adapter; use letters, digits and _")
        if set(self.roles.values()) == {"frozen"}:
            raise ValueError("model.lora.roles freezes every role; nothing would be trained")
        if self.publish == "merged" and set(self.roles.values()) - {"shared"}:
            raise ValueError(
                'model.lora.publish = "merged" makes one model, model.lora.roles need several; set publish = "adapter"'
            )
        return self

    @property
    def own(self) -> tuple[str, ...]:
        """Roles with an adapter of their own, in order."""
        return tuple(sorted(role for role, kind in self.roles.items() if kind == "own"))

    @property
    def frozen(self) -> frozenset[str]:
        """Roles played by the model as it started."""
        return frozenset(role for role, kind in self.roles.items() if kind == "frozen")

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of what is trained: "" is the shared adapter, others are named after their role."""
        shared = not self.roles or "shared" in self.roles.values()
        return *([""] if shared else ()), *self.own

    @property
    def players(self) -> tuple[str | None, ...]:
        """Whoever plays some role: the adapters, and None for the model without any."""
        return *self.adapters, *([None] if self.frozen else ())

    def adapter_of(self, role: str) -> str | None:
        """Name of the adapter that plays a role; None for the model without any."""
        return None if role in self.frozen else role if role in self.own else ""

    @field_validator("target_modules")
    @classmethod
    def _named_once(cls, value: tuple[Projection, ...]) -> tuple[Projection, ...]:
        if not value or len(set(value)) < len(value):
            raise ValueError("target_modules must name at least one projection, and none twice")
        return value
