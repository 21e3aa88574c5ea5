"""How much one peer may send the hub, and how much may wait for it: what is beyond is refused and counted, and nobody
else notices."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Final, Protocol

from protocols.messages import ChunkRequest, Refuse

BURST_S: Final = 2.0
"""A peer that was quiet may send at once what it may send in so long."""
TELL_EVERY_S: Final = 1.0
"""A peer that is too fast is told so this often; its other messages are counted only."""
PEERS: Final = 4096
"""Peers remembered: those heard of last."""
MAX_MESSAGE_BYTES: Final = 256 * 2**20
"""A message to the hub, unless `hub.max_message_bytes` says otherwise."""
MAX_BACKLOG_BYTES: Final = 256 * 2**20
"""Weights on their way to one peer; an actor asks for 32 MiB at a time."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one peer may send."""

    messages_per_s: float
    bytes_per_s: float


@dataclass(slots=True)
class _Bucket:
    messages: float
    size_bytes: float
    at_s: float
    told_s: float = float("-inf")


class Meter:
    """A token bucket of messages and one of bytes for every peer."""

    def __init__(self, limits: Limits, *, burst_bytes: int) -> None:
        """`burst_bytes`: a single message of this size always passes a peer that was quiet."""
        self._limits = limits
        self._most = BURST_S * limits.messages_per_s
        self._most_bytes = max(burst_bytes, BURST_S * limits.bytes_per_s)
        self._buckets: OrderedDict[bytes, _Bucket] = OrderedDict()

    def refusal(self, peer: bytes, size_bytes: int, now_s: float) -> Refuse | None:
        """Why a message must not be handled; None lets it pass. Costs nothing when it is refused."""
        bucket = self._buckets.get(peer)
        if bucket is None:
            bucket = self._buckets[peer] = _Bucket(self._most, self._most_bytes, now_s)
            if len(self._buckets) > PEERS:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(peer)
        passed_s, bucket.at_s = now_s - bucket.at_s, now_s
        bucket.messages = min(self._most, bucket.messages + passed_s * self._limits.messages_per_s)
        bucket.size_bytes = min(self._most_bytes, bucket.size_bytes + passed_s * self._limits.bytes_per_s)
        # What is larger than any message may be is refused for that.
        if bucket.messages >= 1 and bucket.size_bytes >= min(size_bytes, self._most_bytes):
            bucket.messages -= 1
            bucket.size_bytes = max(0.0, bucket.size_bytes - size_bytes)
            return None
        most = f"{self._limits.messages_per_s:g} messages and {self._limits.bytes_per_s:g} bytes a second"
        remedy = "send less, or raise hub.max_messages_per_s or hub.max_bytes_per_s"
        return Refuse(reason="too_fast", detail=f"more than {most}, after a burst of {BURST_S:g} s; {remedy}")

    def tells(self, peer: bytes) -> bool:
        """Whether to answer a refused peer now; at most once in `TELL_EVERY_S`."""
        bucket = self._buckets[peer]
        due = bucket.at_s - bucket.told_s >= TELL_EVERY_S
        if due:
            bucket.told_s = bucket.at_s
        return due


class Sent(Protocol):
    """What is needed of `zmq.MessageTracker`."""

    @property
    def done(self) -> bool: ...


class Backlogs:
    """What was sent to each peer and is still held, because the network has not taken it."""

    def __init__(self) -> None:
        self._held: dict[bytes, deque[tuple[Sent, int]]] = {}

    def add(self, peer: bytes, sent: Sent, size_bytes: int) -> None:
        """Note something large on its way, and forget what has arrived: not every peer asks for chunks."""
        held = self._held[peer] = self._left(peer)
        held.append((sent, size_bytes))
        if len(self._held) > PEERS:
            self._held = {known: left for known in self._held if (left := self._left(known))}

    def refusal(self, peer: bytes, request: ChunkRequest) -> Refuse | None:
        """Why a peer gets no more for now; None to serve it."""
        waiting = sum(size for _, size in self._left(peer))
        if waiting + request.size_bytes <= MAX_BACKLOG_BYTES:
            return None
        detail = f"{waiting} bytes are still on their way to you; read them first"
        return Refuse(reason="too_fast", detail=detail, about=request.name)

    def _left(self, peer: bytes) -> deque[tuple[Sent, int]]:
        held = self._held.get(peer, deque())
        while held and held[0][0].done:
            held.popleft()
        return held
