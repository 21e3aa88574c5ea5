"""Every message that crosses a process boundary. A header is one of these; bulk data follows as raw frames."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from protocols.records import Record, Task

PROTOCOL = 4
"""Raised whenever a message or the tree encoding changes; peers with another number are refused."""

CHUNK_BYTES = 4 * 2**20
"""What one request for a weight object asks for: measured best."""
MAX_CHUNK_BYTES = 16 * 2**20
"""The most it may ask for."""

LARGEST = 2**53
"""JSON readers and SQLite hold every whole number up to here exactly."""
Count = Annotated[int, Field(ge=0, le=LARGEST)]
MaybeVersion = Annotated[int, Field(ge=-1, le=LARGEST)]
"""A version, or -1 for none yet."""
Purpose = Literal["train", "eval"]
RefuseReason = Literal[
    "malformed", "oversized", "unknown_peer", "wrong_protocol", "wrong_config",
    "wrong_key", "unknown_weights", "unknown_lease", "unknown_object", "unexpected", "draining", "too_fast",
]  # fmt: skip

Name = Annotated[str, Field(max_length=200)]
"""An id or a digest."""
Prose = Annotated[str, Field(max_length=4000)]
"""Words for people."""
Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
PeerId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
"""Who an actor or a relay says it is; also part of file names."""


class Wait(Record):
    """Something a process is waiting for right now; `matpo.waits` lists all there are."""

    name: Name
    who: Name
    what: Prose
    since_s: Seconds
    """How long the wait has lasted."""
    limit_s: Seconds
    """After how long it is reported as a stall."""
    remedy: Prose


class WeightObject(Record):
    """One downloadable file that, applied to `base` (None: to nothing), gives `version`."""

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,199}$")
    """Also its file name on either side, so nothing that leads out of a folder."""
    kind: Literal["keyframe", "delta", "fold"]
    version: Count
    base: Count | None
    size_bytes: Count
    digest: Name
    """xxh3-128 of the file's bytes."""


# Actor → hub


class Hello(Record):
    """First message of an actor, and again after a `Refuse(unknown_peer)`."""

    kind: Literal["hello"] = "hello"
    protocol: int
    actor_id: PeerId
    tokenizer_digest: Name
    config_digest: Name
    """Digest of the settings both sides must share (roles, tools, rewards, model)."""
    capacity: int = Field(ge=0, le=2**20)
    """Episodes it can play at once."""


class PullHello(Record):
    """First message of one who only pulls weights: a relay to its hub, an actor to a relay. `Welcome` or `Refuse`."""

    kind: Literal["pull_hello"] = "pull_hello"
    protocol: int
    puller_id: PeerId
    run: Name | None
    """The run whose weights are wanted; None: whichever is here."""

    def refusal(self, run: str) -> Refuse | None:
        """What to answer where the weights of `run` are; None to welcome."""
        if self.protocol != PROTOCOL:
            detail = f"{self.puller_id} speaks protocol {self.protocol}, here {PROTOCOL}; install the same matpo"
            return Refuse(reason="wrong_protocol", detail=detail)
        if self.run not in (None, run):
            detail = (
                f"{self.puller_id} wants weights of run {self.run!r}, here are those of {run!r}; correct the address"
            )
            return Refuse(reason="wrong_config", detail=detail)
        return None


class LeaseRequest(Record):
    """Asks for work; the hub answers with leases as freshness admits them, up to `episodes` episodes in all."""

    kind: Literal["lease_request"] = "lease_request"
    episodes: Count


class TreeUpload(Record):
    """A finished tree, as frames (see `protocols.codec`). Kept by the actor until `Ack`."""

    kind: Literal["tree_upload"] = "tree_upload"
    tree_id: Name


class Heartbeat(Record):
    """Renews the leases it names and says what the actor is doing."""

    kind: Literal["heartbeat"] = "heartbeat"
    leases: tuple[Name, ...] = Field(max_length=2**16)
    version: MaybeVersion
    """Weights the engine holds; -1 for none yet."""
    live_episodes: Count
    outbox_trees: Count
    sampled_tokens: Count
    """Since the actor started."""
    prompt_tokens: Count = 0
    """Given to the engine since it started; 0 where it does not count them."""
    cached_tokens: Count = 0
    """How many of those the engine still had keys and values of."""
    waits: tuple[Wait, ...] = Field(default=(), max_length=64)


class ChunkRequest(Record):
    """Asks for `size_bytes` bytes of a weight object from `offset`."""

    kind: Literal["chunk_request"] = "chunk_request"
    name: Name
    offset: Count
    size_bytes: int = Field(ge=1, le=MAX_CHUNK_BYTES)


class WeightsLoaded(Record):
    """The engine now samples with `version`, whose digest it computed itself."""

    kind: Literal["weights_loaded"] = "weights_loaded"
    version: Count
    digest: Name
    pause_s: Seconds
    """Seconds generation stood still for the swap."""


class Goodbye(Record):
    """The actor leaves; its leases go back at once."""

    kind: Literal["goodbye"] = "goodbye"
    reason: Prose


# Hub → actor


class Welcome(Record):
    """The hub knows the actor; work and weights may follow."""

    kind: Literal["welcome"] = "welcome"
    run: Name
    heartbeat_s: Seconds


class Lease(Record):
    """The right to play some episodes of one task until it expires."""

    kind: Literal["lease"] = "lease"
    lease_id: Name
    group_id: Name
    task: Task
    episodes: tuple[Count, ...] = Field(max_length=2**16)
    """Indexes within the group."""
    purpose: Purpose
    min_version: MaybeVersion
    """Play only with weights at least this new."""
    expires_s: Seconds
    """From now, renewed by every heartbeat that names the lease."""


class Ack(Record):
    """The tree is in the journal; the actor may forget it."""

    kind: Literal["ack"] = "ack"
    tree_id: Name


class Refuse(Record):
    """The last message was not accepted, and why."""

    kind: Literal["refuse"] = "refuse"
    reason: RefuseReason
    detail: str
    about: str = ""
    """Id of what was refused (tree, lease, object), if it had one."""


class Cancel(Record):
    """Stop playing a lease; nothing of it will be accepted."""

    kind: Literal["cancel"] = "cancel"
    lease_id: Name
    reason: Prose


class WeightsReady(Record):
    """New weights can be pulled. Repeated with every heartbeat, so losing one is harmless."""

    kind: Literal["weights_ready"] = "weights_ready"
    version: Count
    digest: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    """Digest of the whole weights at `version` (see `protocols.weights`); also part of a file name."""
    objects: tuple[WeightObject, ...] = Field(max_length=2**16)
    """The actor pulls the smallest chain from what it holds to `version`."""


class Chunk(Record):
    """Bytes of a weight object, in one raw frame."""

    kind: Literal["chunk"] = "chunk"
    name: Name
    offset: Count


class Drain(Record):
    """Finish or return what you hold, then leave."""

    kind: Literal["drain"] = "drain"
    reason: Prose


# Trainer ↔ hub


class TrainerHello(Record):
    """The trainer is up at `step` of a new lineage; trees trained after `step` go back to pending."""

    kind: Literal["trainer_hello"] = "trainer_hello"
    protocol: int
    step: Count
    config_digest: Name


class TrainerWelcome(Record):
    """The lineage number the hub gave this start of the trainer."""

    kind: Literal["trainer_welcome"] = "trainer_welcome"
    lineage: int


class TrainerBeat(Record):
    """The trainer lives, and what it is busy with. Sent beside its questions, whatever it does; answered by `Ok`."""

    kind: Literal["trainer_beat"] = "trainer_beat"
    waits: tuple[Wait, ...]


class BatchRequest(Record):
    """Asks for the groups of optimizer step `step`; answered when enough are complete, or by `NotYet`."""

    kind: Literal["batch_request"] = "batch_request"
    step: Count
    """The step about to be taken, counting from 1."""
    settled: Count = 0
    """The oldest checkpoint kept: what was trained up to this step never becomes pending again."""


class NotYet(Record):
    """No batch yet; ask again."""

    kind: Literal["not_yet"] = "not_yet"


class Batch(Record):
    """The groups of one step, oldest first; each tree is `frame_counts[i]` frames of those that follow."""

    kind: Literal["batch"] = "batch"
    step: Count
    frame_counts: tuple[int, ...]


class StepDone(Record):
    """The optimizer step was taken with these trees; the ledger records it. Sent again until `Ok`."""

    kind: Literal["step_done"] = "step_done"
    lineage: Count
    step: Count
    trained: tuple[str, ...]
    filtered: tuple[tuple[str, str], ...]
    """(tree id, reason) of trees the trainer left out of the step."""


class Publish(Record):
    """New weight objects lie in the run's weight directory."""

    kind: Literal["publish"] = "publish"
    version: Count
    digest: str
    objects: tuple[WeightObject, ...]


class Ok(Record):
    """Done and durable."""

    kind: Literal["ok"] = "ok"


ActorMessage = Hello | PullHello | LeaseRequest | TreeUpload | Heartbeat | ChunkRequest | WeightsLoaded | Goodbye
TrainerMessage = TrainerHello | TrainerBeat | BatchRequest | StepDone | Publish
HubMessage = (
    Welcome | Lease | Ack | Refuse | Cancel | WeightsReady | Chunk | Drain | TrainerWelcome | NotYet | Batch | Ok
)
Message = Annotated[ActorMessage | TrainerMessage | HubMessage, Field(discriminator="kind")]

MESSAGE: TypeAdapter[ActorMessage | TrainerMessage | HubMessage] = TypeAdapter(Message)
