"""What every part of the settings has in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of every part of the settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")
