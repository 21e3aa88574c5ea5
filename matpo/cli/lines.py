"""The lines of metrics.jsonl that the display needs, as typed records; fields it does not show are left out."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, JsonValue


class Line(BaseModel):
    """Base: other processes write these lines, with more fields than are read here."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class TrainerLine(Line):
    """One optimizer step."""

    step: int
    reward_mean: float
    staleness_mean: float
    staleness_max: int
    wait_s: float
    step_s: float
    publish_s: float


class HubLine(Line):
    """The hub's state every few seconds."""

    actors: int
    leased_episodes: int
    pending_trees: int
    trained_trees: int
    filtered_trees: int
    episodes_per_s: float
    sampled_tokens_per_s: float
    waits: tuple[dict[str, JsonValue], ...] = ()


class EvaluationLine(Line):
    """One finished round of held-out questions."""

    label: str
    step: int
    questions: int
    accuracy: float | None
    format: float | None
    reading: float | None
    accuracy_by_hops: dict[str, float]
