"""Where episodes are played: what all episodes of an actor share (`Stage`) and what one of them collects (`Scene`)."""

from __future__ import annotations

from typing import Self

from actors.engines.engine import Engine
from actors.tools.plane import ToolPlane
from matpo.config import Config


class Stage:
    """The engine, the tools, the tokenizer and the roles that every episode of this actor uses."""

    @classmethod
    def open(cls, config: Config, *, engine: Engine, tools: ToolPlane, actor_id: str) -> Self:
        """Load the tokenizer and check roles, templates and tools; `UserError` names what does not fit."""
        raise NotImplementedError

    def note_weights(self) -> None:
        """Remember the version and digest the engine holds now; call it after every `engine.load`."""
        raise NotImplementedError
