"""What a measure says of an answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verdict:
    """A score and what may be told about it."""

    score: float | None
    """None: it could not be scored, through no fault of the answer's."""
    passed: bool = False
    """Nothing is left to improve."""
    feedback: str = ""
    """For an agent that may try again."""


UNKNOWN = Verdict(None)
