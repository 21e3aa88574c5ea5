"""What every part of the settings has in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of every part of the settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def changed(self, *names: str) -> list[str]:
        """Which of these options have another value than their default."""
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
