"""The lines of metrics.jsonl that the display needs, as typed records; fields it does not show are left out."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from protocols.messages import Wait


class Line(BaseModel):
    """Base: other processes write these lines, with more fields than are read here."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class RoleLine(Line):
    """How far the policy had moved, over a role's tokens."""

    gradient: float | None
    mismatch_kl: float | None
    advantage_mean: float | None
    advantage_variance: float | None


class RolePlayLine(Line):
    """A role's trajectories in the episodes of a step."""

    truncated: float
    staleness_mean: float
    free_riding: float | None


class VitalsLine(Line):
    """What the collapse watch looked at."""

    signs: tuple[str, ...]


class TrainerLine(Line):
    """One optimizer step."""

    step: int
    reward_mean: float
    staleness_mean: float
    staleness_max: int
    wait_s: float
    step_s: float
    publish_s: float
    tokens: int
    unique_tokens: int
    flops: int
    packed_flops: int
    padded_flops: int
    peak_bytes: int
    roles: dict[str, RoleLine]
    role_plays: dict[str, RolePlayLine]
    vitals: VitalsLine


class LedgerLine(Line):
    """What became of the trees so far."""

    pending: int
    trained: int
    filtered: int
    evaluation: int


class HubLine(Line):
    """The hub's state every few seconds."""

    actors: int
    ledger: LedgerLine
    in_flight: int
    """Episodes leased and not yet back."""
    evaluation: str | None
    """The round of held-out questions going on."""
    evaluation_left: int
    episodes_per_s: float
    sampled_tokens_per_s: float
    waits: tuple[Wait, ...]


class EvaluationLine(Line):
    """One finished round of held-out questions."""

    label: str
    step: int
    questions: int
    accuracy: float | None
    format: float | None
    reading: float | None
    accuracy_by_hops: dict[str, float]


class Change(Line):
    """A figure before and after training."""

    before: float | None
    after: float | None


class Sampled(Line):
    """Training episodes of a stretch of steps, at the training temperature."""

    accuracy: float | None


class Swaps(Line):
    """Engines taking new weights."""

    count: int
    pause_median_s: float
    pause_max_s: float


class SummaryFile(Line):
    """RUN/summary.json."""

    steps: int
    duration_s: float
    accuracy: Change
    accuracy_by_hops: dict[str, Change]
    format: Change
    reading: Change
    sampled_before: Sampled | None
    sampled_after: Sampled | None
    all_fail_fraction: float | None
    all_pass_fraction: float | None
    episodes: int
    episodes_per_s: float
    sampled_tokens_per_s: float
    staleness_mean: float | None
    staleness_max: int | None
    swaps: Swaps | None = None
    ledger: LedgerLine
    ledger_adds_up: bool


class TracedTurn(Line):
    kind: str
    text: str | None


class TracedTrajectory(Line):
    role: str
    parent: tuple[int, int] | None
    turns: tuple[TracedTurn, ...]


class TraceFile(Line):
    """RUN/traces/before.json and after.json."""

    question: str
    answers: tuple[str, ...]
    rewards: dict[str, float | None]
    trajectories: tuple[TracedTrajectory, ...]
