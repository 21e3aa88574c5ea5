"""What to do when several figures together say that training is about to collapse."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from matpo.section import Section


class Collapse(Section):
    """Early warning; each limit is one sign, and only several together for some steps raise the alarm."""

    action: Literal["off", "warn", "pause", "rollback"] = "warn"
    """`warn`: say so in log, metrics and display. `pause`: save and stop the run until somebody starts it again.
    `rollback`: go back to the last checkpoint from before the first sign, and on from there with a smaller rate."""
    signs: int = Field(default=2, ge=1, le=4)
    """So many of the four must be seen in the same step …"""
    patience_steps: int = Field(default=3, ge=1)
    """… in so many steps in a row."""
    mismatch_kl: float = Field(default=0.1, gt=0)
    """Sign: KL(μ‖π) above this many nats per token."""
    entropy_share: float = Field(default=0.2, gt=0, lt=1)
    """Sign: entropy below this share of what it was in the run's first steps, or as many times above it."""
    truncated_rise: float = Field(default=0.25, gt=0, lt=1)
    """Sign: the share of trajectories cut short by a limit, above that of the run's first steps by this much."""
    gradient_cosine: float = Field(default=0.7, gt=0, le=1)
    """Sign: cosine of the gradient with the mean of those before it above this."""
    rollback_lr_factor: float = Field(default=0.5, gt=0, le=1)
    """`rollback` only: multiplies the learning rate after each."""
