"""What an episode leaves behind: tasks, trajectories and trees. Frozen, checked when built, token-exact."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue

Tokens = NDArray[np.int32]
Flags = NDArray[np.bool_]
Floats = NDArray[np.float32]

TurnKind = Literal["prompt", "sampled", "tool_result", "worker_report", "instruction"]
StopReason = Literal["stop", "length", "context", "aborted"]
Status = Literal["done", "turn_limit", "context_limit", "tool_failure", "engine_failure", "cancelled"]
Outcome = Literal["ok", "model_error", "infrastructure"]

Index = Annotated[int, Field(ge=0, le=2**53)]
"""A count or a place: what every reader of JSON holds exactly."""

INFRASTRUCTURE: frozenset[Status] = frozenset({"tool_failure", "engine_failure", "cancelled"})
"""Ends of a trajectory that are nobody's policy: masked from the loss, never a negative reward."""

LINEAGE_STRIDE = 1_000_000
"""A version is `lineage * LINEAGE_STRIDE + step`: readable in a log, and one int32 per token."""


def version_of(*, lineage: int, step: int) -> int:
    """The version number of the weights after `step` optimizer steps in `lineage`."""
    if not 0 <= step < LINEAGE_STRIDE or not 0 <= lineage < 2_000:
        raise ValueError(f"version needs 0 <= step < {LINEAGE_STRIDE} and 0 <= lineage < 2000, got {step=} {lineage=}")
    return lineage * LINEAGE_STRIDE + step


def step_of(version: int) -> int:
    """Optimizer steps taken before `version` was published."""
    return version % LINEAGE_STRIDE


def lineage_of(version: int) -> int:
    """How many times a learner had resumed from a checkpoint when `version` was published."""
    return version // LINEAGE_STRIDE


class Record(BaseModel):
    """Base of every typed record: immutable, and a misspelt field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Task(Record):
    """One question. `task_id` is a hash of the content, so the same question is the same task everywhere."""

    task_id: str
    question: str
    answers: tuple[str, ...]
    """Reference answers; any one of them is right."""
    metadata: dict[str, JsonValue] = {}
    """What reports group by (hops, template, world, …); never shown to the model."""
    tool_arguments: dict[str, dict[str, JsonValue]] = {}
    """Per bare tool name, arguments fixed for this task and hidden from the model (say, the collection to search)."""

    @classmethod
    def make(
        cls,
        question: str,
        answers: tuple[str, ...],
        metadata: dict[str, JsonValue] | None = None,
        tool_arguments: dict[str, dict[str, JsonValue]] | None = None,
    ) -> Self:
        """Build a task and derive its id (sha256 of the canonical JSON of its content, 16 hex digits)."""
        content = [question, list(answers), metadata or {}, tool_arguments or {}]
        digest = hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]
        return cls(
            task_id=digest,
            question=question,
            answers=answers,
            metadata=metadata or {},
            tool_arguments=tool_arguments or {},
        )


class Turn(Record):
    """A span `[start, stop)` of a trajectory's tokens that one party wrote."""

    kind: TurnKind
    start: int
    stop: int
    call_id: str | None = None
    """The tool call this turn answers (tool_result, worker_report)."""
    stop_reason: StopReason | None = None
    """Why sampling ended (sampled turns only)."""


class ToolSpan(Record):
    """One tool or worker call: who asked, what came of it and how long it took."""

    trajectory: Index
    """Index of the calling trajectory in the tree."""
    turn: Index
    """Index of the sampled turn that holds the call."""
    call_id: str
    server: str
    """MCP server name, or `agent` for a delegation to another role."""
    tool: str
    outcome: Outcome
    """`model_error`: the model's own fault, told to it. `infrastructure`: told to it and masked from the loss."""
    started_s: FiniteFloat
    """Seconds since the episode began."""
    seconds: FiniteFloat
    result_bytes: Index


class Joint(Record):
    """A joint action: agents that acted at once, scored together. Those who saw its outcome come after it."""

    members: Annotated[tuple[Index, ...], Field(min_length=1)]
    """Trajectories, one per agent, in the workflow's order of agents."""
    after: Index | None = None
    """Index of the joint action whose outcome they had seen; None where they had only the task."""
    reward: FiniteFloat | None = None
    """Of this joint action alone, not of what followed; None means not scored."""


class Replay(Record):
    """What came of another choice at one decision of an episode, all that was before it or beside it held fixed."""

    trajectory: Index
    """Of the episode itself, the one that decided …"""
    turn: Index
    """… in this sampled turn."""
    alternative: Index
    """The trajectory that holds the other choice alone; those after it, up to the next alternative, are what followed.
    In all of them what is as it was is given, not sampled."""
    reward: FiniteFloat | None
    """Total of the episode that it led to; None means not scored."""


class WeightStamp(Record):
    """The identity of one set of weights."""

    version: Index
    digest: str


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """One agent's token sequence, exactly as the engine saw and sampled it.

    `logprobs` (after temperature, top-k, top-p) and `versions` have one entry per *sampled* token, in order.
    """

    role: str
    parent: tuple[int, int] | None
    """(trajectory index, index of its turn that asked for this one, or that this one follows as the same agent's next
    act); None for an agent that starts from the task alone, as the first does."""
    tokens: Tokens
    sampled: Flags
    """True where the policy chose the token."""
    logprobs: Floats
    """Behaviour-policy log-probability μ of each sampled token."""
    versions: Tokens
    """Version of the weights that sampled each sampled token."""
    turns: tuple[Turn, ...]
    status: Status

    def __post_init__(self) -> None:
        chosen = int(np.count_nonzero(self.sampled))
        if len(self.tokens) != len(self.sampled):
            raise ValueError(
                f"{self.role} trajectory has {len(self.tokens)} tokens but {len(self.sampled)} sampled flags"
            )
        if len(self.logprobs) != chosen or len(self.versions) != chosen:
            raise ValueError(
                f"{self.role} trajectory sampled {chosen} tokens but has {len(self.logprobs)} logprobs"
                f" and {len(self.versions)} versions"
            )
        if len(self.tokens) and int(self.tokens.min()) < 0:
            raise ValueError(f"{self.role} trajectory holds the negative token id {int(self.tokens.min())}")
        if chosen and not (np.isfinite(self.logprobs).all() and float(self.logprobs.max()) <= 1e-4):
            raise ValueError(f"{self.role} trajectory has a log-probability that is not finite or above 0")
        if chosen and int(self.versions.min()) < 0:
            raise ValueError(f"{self.role} trajectory has the negative weight version {int(self.versions.min())}")
        self._check_turns()

    def _check_turns(self) -> None:
        at = 0
        for number, turn in enumerate(self.turns):
            if turn.start != at or turn.stop < turn.start:
                raise ValueError(
                    f"{self.role} turn {number} spans [{turn.start}, {turn.stop}) but the one before ends at {at}"
                )
            at = turn.stop
        if at != len(self.tokens):
            raise ValueError(f"{self.role} turns cover {at} of {len(self.tokens)} tokens")


def _distinct(versions: Tokens) -> set[int]:
    """Found at the changes rather than by sorting: there are many tokens and few swaps of weights."""
    if not len(versions):
        return set()
    return {int(versions[0]), *versions[1:][versions[1:] != versions[:-1]].tolist()}


@dataclass(frozen=True, slots=True, eq=False)
class EpisodeTree:
    """One episode: every agent's trajectory, parents first; say, the planner's and those of the agents it called."""

    tree_id: str
    group_id: str
    lease_id: str
    episode: int
    """Index of the episode within its group, 0 … G-1."""
    actor_id: str
    task: Task
    trajectories: tuple[Trajectory, ...]
    rewards: dict[str, float | None]
    """Reward parts by name, `total` among them; None means not scored (never 0)."""
    weights: tuple[WeightStamp, ...]
    """Every set of weights that sampled a token of this tree."""
    tool_spans: tuple[ToolSpan, ...]
    started_at: float
    """Unix time."""
    seconds: float
    earned: tuple[float | None, ...] = ()
    """What each trajectory's own act was worth, apart from what followed; empty where nobody scores single acts."""
    joints: tuple[Joint, ...] = ()
    """Joint actions, earlier ones first; empty where agents do not act at once."""
    replays: tuple[Replay, ...] = ()
    """Alternatives by decision; their trajectories come after those of the episode itself."""

    def __post_init__(self) -> None:
        if not self.trajectories:
            raise ValueError(f"tree {self.tree_id} has no trajectory")
        for index, trajectory in enumerate(self.trajectories):
            parent = trajectory.parent
            if parent is not None and not (
                0 <= parent[0] < index and 0 <= parent[1] < len(self.trajectories[parent[0]].turns)
            ):
                raise ValueError(f"tree {self.tree_id}: trajectory {index} names the unknown parent turn {parent}")
        known = {stamp.version for stamp in self.weights}
        used = {version for t in self.trajectories for version in _distinct(t.versions)}
        if used - known:
            raise ValueError(f"tree {self.tree_id} holds tokens of versions {sorted(used - known)} without a digest")
        for name, value in self.rewards.items():
            if value is not None and not np.isfinite(value):
                raise ValueError(f"tree {self.tree_id}: reward {name!r} is {value}")
        self._check_acts()

    def _check_acts(self) -> None:
        count = len(self.trajectories)
        if self.earned and len(self.earned) != count:
            raise ValueError(f"tree {self.tree_id} has {count} trajectories but says what {len(self.earned)} earned")
        if not all(value is None or np.isfinite(value) for value in self.earned):
            raise ValueError(f"tree {self.tree_id}: not every act earned a finite number: {self.earned}")
        for index, joint in enumerate(self.joints):
            if max(joint.members) >= count or (joint.after is not None and joint.after >= index):
                raise ValueError(f"tree {self.tree_id}: joint action {index} names what is not there: {joint}")
        own = len(self.played)
        for replay in self.replays:
            if not replay.trajectory < own <= replay.alternative < count or replay.turn >= len(
                self.trajectories[replay.trajectory].turns
            ):
                raise ValueError(f"tree {self.tree_id}: a replay names what is not there: {replay}")

    @property
    def reward(self) -> float | None:
        """The scalar the policy is trained on; None when the episode could not be scored."""
        return self.rewards.get("total")

    @property
    def played(self) -> tuple[Trajectory, ...]:
        """The trajectories of the episode itself, without those of its replays."""
        return self.trajectories[: min((replay.alternative for replay in self.replays), default=None)]

    @property
    def token_count(self) -> int:
        """Tokens of all trajectories together."""
        return sum(len(t.tokens) for t in self.trajectories)

    @property
    def sampled_count(self) -> int:
        """Tokens the policy chose, over all trajectories."""
        return sum(len(t.versions) for t in self.trajectories)

    @property
    def versions(self) -> tuple[int, ...]:
        """Every version that sampled a token of this tree, ascending."""
        return tuple(sorted(stamp.version for stamp in self.weights))


@dataclass(frozen=True, slots=True, eq=False)
class EpisodeGroup:
    """The trees of one task and one lease: what advantages are computed over."""

    group_id: str
    task: Task
    trees: tuple[EpisodeTree, ...]

    def __post_init__(self) -> None:
        for tree in self.trees:
            if tree.group_id != self.group_id or tree.task.task_id != self.task.task_id:
                raise ValueError(
                    f"group {self.group_id} (task {self.task.task_id}) was given tree {tree.tree_id}"
                    f" of group {tree.group_id} (task {tree.task.task_id})"
                )
