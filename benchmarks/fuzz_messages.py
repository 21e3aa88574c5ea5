"""Messages as they cross the wire, and what becomes of them in hostile hands. Everything follows from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import orjson
from pydantic import JsonValue

from protocols.codec import encode_tree
from protocols.messages import (
    PROTOCOL,
    Ack,
    ActorMessage,
    BatchRequest,
    Cancel,
    Chunk,
    ChunkRequest,
    Drain,
    Goodbye,
    Heartbeat,
    Hello,
    HubMessage,
    Lease,
    LeaseRequest,
    NotYet,
    Ok,
    Publish,
    PullHello,
    Refuse,
    StepDone,
    TrainerHello,
    TrainerMessage,
    TrainerWelcome,
    TreeUpload,
    Wait,
    WeightObject,
    WeightsLoaded,
    WeightsReady,
    Welcome,
)
from protocols.records import EpisodeTree, Task, ToolSpan, Trajectory, Turn, WeightStamp

Parts = list[bytes]
WAIT = Wait(name="leases", who="actor-0", what="leases", since_s=1.5, limit_s=60.0, remedy="raise freshness.eta")
TASK = Task.make("Who led the guild?", ("Ada",), {"hops": 2, "chain": ["a", "b"]}, {"search": {"collection": "w1"}})
ODD = [
    b"", b"null", b"true", b"-1", b"0", b"1e999", b"NaN", b"-Infinity", b"9007199254740993", b"1" * 400, b'""', b"[]",
    b"{}", b"[" * 3000, b'{"a":' * 500, b'"\\ud800"', b'"\\u0000"', b"\xff\xfe", b"\x00", b'"../../etc/passwd"',
    b'"' + b"x" * 5000 + b'"',
]  # fmt: skip
"""What readers of JSON stumble over."""
PLAUSIBLE: Sequence[JsonValue] = (
    0, 1, 2, 7, 63, 2**20, 2**31 - 1, 2**31, 2**53, -1, 0.5, 1e300, "", "x", "actor-0", "train-000000.0", "keyframe-0",
    "../keyframe-0", "weights-0", "malformed", "a" * 300, "\u0000", "train-1", "train-0", "train-\u00b2", "train--1",
    None, True, [], {}, [0, 1], ["x", "y"],
)  # fmt: skip
"""What a message may hold elsewhere: it stays JSON, and often a message."""


def make_tree(lease: Lease, episode: int, *, digest: str) -> EpisodeTree:
    """A planner, a worker it asked, with tool calls, and one that this asked in turn, of version 0."""
    planner = _trajectory("planner", None, [("prompt", 9), ("sampled", 14), ("worker_report", 6), ("sampled", 5)])
    worker = _trajectory("worker", (0, 1), [("prompt", 9), ("sampled", 7), ("tool_result", 20), ("sampled", 8)])
    helper = _trajectory("worker", (1, 3), [("prompt", 9), ("sampled", 12)])
    return EpisodeTree(
        tree_id=f"{episode:032x}",
        group_id=lease.group_id,
        lease_id=lease.lease_id,
        episode=episode,
        actor_id="actor-0",
        task=lease.task,
        trajectories=(planner, worker, helper),
        rewards={"total": 1.0, "answer": 1.0, "format": None},
        weights=(WeightStamp(version=0, digest=digest),),
        tool_spans=(
            ToolSpan(
                trajectory=1, turn=1, call_id="call", server="search", tool="search", outcome="ok", started_s=0.1,
                seconds=0.2, result_bytes=90,
            ),
        ),
        started_at=100.0,
        seconds=2.0,
    )  # fmt: skip


def _trajectory(role: str, parent: tuple[int, int] | None, spans: Sequence[tuple[str, int]]) -> Trajectory:
    turns: list[Turn] = []
    sampled: list[bool] = []
    for kind, length in spans:
        fields: dict[str, object] = {"kind": kind, "start": len(sampled), "stop": len(sampled) + length}
        fields["call_id"] = "call" if kind in ("tool_result", "worker_report") else None
        fields["stop_reason"] = "stop" if kind == "sampled" else None
        turns.append(Turn.model_validate(fields))
        sampled += [kind == "sampled"] * length
    chosen = sum(sampled)
    return Trajectory(
        role=role,
        parent=parent,
        tokens=np.arange(len(sampled), dtype=np.int32) * 700,
        sampled=np.array(sampled),
        logprobs=np.full(chosen, -0.5, dtype=np.float32),
        versions=np.zeros(chosen, dtype=np.int32),
        turns=tuple(turns),
        status="done",
    )


def to_hub(lease: Lease, hello: Hello, config_digest: str, published: WeightObject, digest: str) -> list[Parts]:
    """One of everything that a hub is ever sent."""
    tree = make_tree(lease, 0, digest=digest)
    messages: list[ActorMessage | TrainerMessage] = [
        hello,
        PullHello(protocol=PROTOCOL, puller_id="relay-0", run="fuzz"),
        LeaseRequest(episodes=4),
        Heartbeat(
            leases=(lease.lease_id,), version=0, live_episodes=3, outbox_trees=1, sampled_tokens=99, waits=(WAIT,)
        ),
        ChunkRequest(name=published.name, offset=0, size_bytes=4),
        WeightsLoaded(version=0, digest=digest, pause_s=0.01),
        Goodbye(reason="SIGTERM"),
        TrainerHello(protocol=PROTOCOL, step=0, config_digest=config_digest),
        BatchRequest(step=1),
        StepDone(lineage=0, step=1, trained=(tree.tree_id,), filtered=(("x", "stale"),)),
        Publish(version=1, digest="d1", objects=(published,)),
    ]
    plain = [[message.model_dump_json().encode()] for message in messages]
    return [*plain, *[upload(tree)] * len(plain)]


def upload(tree: EpisodeTree) -> Parts:
    """A tree as an actor sends it."""
    return [TreeUpload(tree_id=tree.tree_id).model_dump_json().encode(), *encode_tree(tree)]


def to_actor(tree_id: str) -> list[Parts]:
    """One of everything that an actor is ever sent; `tree_id` is in its outbox."""
    item = WeightObject(name="keyframe-0", kind="keyframe", version=0, base=None, size_bytes=8, digest="d" * 32)
    lease = Lease(
        lease_id="train-000001.0", group_id="train-000001", task=TASK, episodes=(0, 1), purpose="train", min_version=0,
        expires_s=60.0,
    )  # fmt: skip
    messages: list[HubMessage] = [
        Welcome(run="fuzz", heartbeat_s=2.0),
        lease,
        Ack(tree_id=tree_id),
        Refuse(reason="malformed", detail="no", about=tree_id),
        Refuse(reason="unknown_peer", detail="say hello first"),
        Cancel(lease_id=lease.lease_id, reason="late"),
        WeightsReady(version=0, digest="a" * 32, objects=(item,)),
        Drain(reason="complete"),
        TrainerWelcome(lineage=1),
        NotYet(),
        Ok(),
    ]
    plain = [[message.model_dump_json().encode()] for message in messages]
    return [*plain, [Chunk(name="keyframe-0", offset=0).model_dump_json().encode(), b"contents"]]


def _with_another_value(content: JsonValue, choose: random.Random) -> JsonValue:
    """The same, but for one value somewhere inside."""
    if isinstance(content, dict) and content and choose.random() < 0.9:
        key = choose.choice([key for key in content if key != "kind"] or list(content))
        return content | {key: _with_another_value(content[key], choose)}
    if isinstance(content, list) and content and choose.random() < 0.9:
        at = choose.randrange(len(content))
        return [*content[:at], _with_another_value(content[at], choose), *content[at + 1 :]]
    alike = [value for value in PLAUSIBLE if type(value) is type(content)] if choose.random() < 0.8 else PLAUSIBLE
    return choose.choice(alike or PLAUSIBLE)


class Mutator:
    """Draws messages that were damaged in one to four ways, some of them entirely made up."""

    def __init__(self, corpus: Sequence[Parts], seed: int) -> None:
        self._corpus = corpus
        self._random = random.Random(seed)
        self._ways_of_bytes: tuple[Callable[[Parts], None], ...] = (
            self._flip, self._flip, self._overwrite, self._overwrite, self._insert, self._cut, self._repeat,
            self._splice,
        )  # fmt: skip
        self._ways = (
            *self._ways_of_bytes, self._odd_value, self._odd_value, self._drop_frame, self._double_frame,
            self._swap_frames,
        )  # fmt: skip

    def draw(self) -> Parts:
        """One message: frames, at least one."""
        choose = self._random
        if choose.random() < 0.03:
            return [choose.randbytes(choose.randrange(200)) for _ in range(choose.randrange(1, 10))]
        parts = list(choose.choice(self._corpus))
        ways = self._ways if choose.random() < 0.5 else (self._field,)
        for _ in range(choose.choice((1, 1, 1, 2, 3, 4))):
            choose.choice(ways)(parts)
        return parts

    def damage(self, content: bytes) -> bytes:
        """The same for a file."""
        parts = [content]
        for _ in range(self._random.randrange(1, 4)):
            self._random.choice(self._ways_of_bytes)(parts)
        return parts[0]

    def _place(self, parts: Parts) -> tuple[int, int]:
        """A frame and a place in it."""
        which = self._random.randrange(len(parts))
        return which, self._random.randrange(len(parts[which]) + 1)

    def _flip(self, parts: Parts) -> None:
        which, at = self._place(parts)
        frame = bytearray(parts[which])
        if at < len(frame):
            frame[at] ^= 1 << self._random.randrange(8)
        parts[which] = bytes(frame)

    def _overwrite(self, parts: Parts) -> None:
        which, at = self._place(parts)
        new = self._random.choice(
            [b"\x00", b"\xff", b"\xff\xff\xff\xff", b"\x00\x00\x00\x80", self._random.randbytes(4)]
        )
        parts[which] = parts[which][:at] + new + parts[which][at + len(new) :]

    def _field(self, parts: Parts) -> None:
        """Give one field of a JSON frame another value: most of these messages are well formed."""
        which = self._random.randrange(min(2, len(parts)))  # the header, or that of a tree
        try:
            content: JsonValue = orjson.loads(parts[which])
        except orjson.JSONDecodeError:
            return
        parts[which] = orjson.dumps(_with_another_value(content, self._random))

    def _odd_value(self, parts: Parts) -> None:
        """Put something odd where JSON has a value."""
        which, at = self._place(parts)
        frame = parts[which]
        colon = frame.find(b":", at)
        if colon < 0:
            parts[which] = self._random.choice(ODD)
            return
        ends = [end for mark in (b",", b"}", b"]") if (end := frame.find(mark, colon)) > 0]
        parts[which] = frame[: colon + 1] + self._random.choice(ODD) + frame[min(ends, default=len(frame)) :]

    def _insert(self, parts: Parts) -> None:
        which, at = self._place(parts)
        parts[which] = parts[which][:at] + self._random.choice([*ODD, self._random.randbytes(8)]) + parts[which][at:]

    def _cut(self, parts: Parts) -> None:
        which, at = self._place(parts)
        parts[which] = parts[which][:at] if self._random.random() < 0.5 else parts[which][at:]

    def _repeat(self, parts: Parts) -> None:
        which, at = self._place(parts)
        piece = parts[which][at : at + self._random.randrange(1, 64)]
        parts[which] = parts[which][:at] + piece * self._random.randrange(1, 5) + parts[which][at:]

    def _splice(self, parts: Parts) -> None:
        which, at = self._place(parts)
        other = self._random.choice(self._random.choice(self._corpus))
        parts[which] = parts[which][:at] + other[self._random.randrange(len(other) + 1) :]

    def _drop_frame(self, parts: Parts) -> None:
        if len(parts) > 1:
            parts.pop(self._random.randrange(len(parts)))

    def _double_frame(self, parts: Parts) -> None:
        parts.insert(self._random.randrange(len(parts)), self._random.choice(parts))

    def _swap_frames(self, parts: Parts) -> None:
        if len(parts) > 1:
            one, other = self._random.randrange(len(parts)), self._random.randrange(len(parts))
            parts[one], parts[other] = parts[other], parts[one]
