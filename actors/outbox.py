"""Finished trees as files until the hub has them: a killed actor, hub or network loses none and doubles none.

One file per tree, written beside and renamed; the page cache keeps it when the process is killed (not when the machine
loses power: then the lease expires and is played again). While the disk is full, trees wait in memory and no episode
begins.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol, Self

import anyio
import structlog

from matpo.errors import NO_SPACE, UserError
from protocols.codec import MalformedTree, decode_header, encode_tree
from protocols.limits import MAX_MESSAGE_BYTES
from protocols.messages import Refuse, RefuseReason, TreeUpload
from protocols.records import EpisodeTree

log: structlog.stdlib.BoundLogger = structlog.get_logger()

SUFFIX = ".tree"
WINDOW_TREES = 32
"""Trees on their way at once: credits that bound the hub's memory."""
RESEND_S = 15.0
"""A tree not acknowledged for so long is sent again; the hub knows it by its id."""
FINAL: frozenset[RefuseReason] = frozenset({"malformed", "oversized", "unknown_weights", "unknown_lease"})
"""Refusals that no resend can change: the tree is dropped and counted."""


class Uplink(Protocol):
    """What the outbox needs of `protocols.channel.HubClient`."""

    async def send(self, message: TreeUpload, frames: Sequence[bytes] = ()) -> bool: ...

    async def wait_connected(self) -> None: ...


@dataclass(slots=True)
class _Entry:
    lease_id: str
    content: bytes | None = None
    """Of a tree that the disk had no room for."""
    sent_at: float | None = field(default=None)
    """Monotonic seconds; None while it waits to be sent."""


class Outbox:
    """The trees of one actor that the hub has not acknowledged, oldest first."""

    def __init__(self, folder: Path, *, limit_trees: int, limit_bytes: int, resend_s: float) -> None:
        self._folder = folder
        self._limit = limit_trees
        self._limit_bytes = limit_bytes
        self._resend_s = resend_s
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        """Only the first `WINDOW_TREES` are ever on their way."""
        self._in_memory = 0
        """Trees the disk had no room for."""
        self._changed = anyio.Event()
        self.dropped: Counter[str] = Counter()
        """Trees the hub will never take, by reason."""

    @classmethod
    @contextmanager
    def open(
        cls, folder: Path, *, limit_trees: int, limit_bytes: int = MAX_MESSAGE_BYTES, resend_s: float = RESEND_S
    ) -> Iterator[Self]:
        """Find what an earlier process left; `limit_bytes` is what the hub takes in one message.

        Raises `UserError` where another actor uses the folder.
        """
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"outbox {str(folder)!r} is in use by another actor; give this one its own --actor-id"
                ) from error
            outbox = cls(folder, limit_trees=limit_trees, limit_bytes=limit_bytes, resend_s=resend_s)
            outbox._recover()
            yield outbox
        finally:
            os.close(lock)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def full(self) -> bool:
        """Whether playing must pause until the hub takes some."""
        return len(self._entries) >= self._limit or self._in_memory > 0

    @property
    def leases(self) -> frozenset[str]:
        """Leases with trees here; heartbeats keep them alive."""
        return frozenset(entry.lease_id for entry in self._entries.values())

    def put(self, tree: EpisodeTree) -> None:
        """Write a finished tree. Raises `ValueError` for one beyond the limits of the codec or the hub."""
        entry, content = _Entry(tree.lease_id), _pack(encode_tree(tree))
        if len(content) > self._limit_bytes:
            # Far beyond it the hub hangs up without a word, and every tree behind this one would be cut off with it.
            raise ValueError(
                f"tree {tree.tree_id} has {len(content)} bytes, more than hub.max_message_bytes = {self._limit_bytes}:"
                " raise that, or lower the roles' limits"
            )
        draft = self._folder / f"{tree.tree_id}.draft"
        try:
            draft.write_bytes(content)
            draft.rename(self._path(tree.tree_id))
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            draft.unlink(missing_ok=True)
            log.warning("disk full, tree kept in memory", folder=str(self._folder), tree=tree.tree_id)
            entry.content = content
            self._in_memory += 1
        self._entries[tree.tree_id] = entry
        self._notice()

    def acknowledge(self, tree_id: str) -> None:
        """The hub has the tree: forget it. A second acknowledgement is nothing."""
        entry = self._entries.pop(tree_id, None)
        if entry is None:
            return
        if entry.content is None:
            self._path(tree_id).unlink()
        else:
            self._in_memory -= 1
        self._notice()

    def refuse(self, refusal: Refuse) -> bool:
        """Handle a refusal about one of these trees. False when it is about something else."""
        entry = self._entries.get(refusal.about)
        if entry is None:
            return False
        if refusal.reason in FINAL:
            self.dropped[refusal.reason] += 1
            log.warning("tree dropped", tree=refusal.about, reason=refusal.reason, detail=refusal.detail)
            self.acknowledge(refusal.about)
        return True

    def resend_all(self) -> None:
        """A hub (re)appeared that may know nothing of what was on its way."""
        for entry in self._entries.values():
            entry.sent_at = None
        self._notice()

    async def wait_empty(self) -> None:
        """Until everything is acknowledged. Bound it with a deadline of your own."""
        while self._entries:
            await self._changed.wait()

    async def wait_changed(self) -> None:
        """Until a tree came or went."""
        await self._changed.wait()

    async def upload(self, uplink: Uplink) -> None:
        """Send trees as they come, at most `WINDOW_TREES` unacknowledged, forever."""
        while True:
            tree_id = self._next()
            if tree_id is None:
                with anyio.move_on_after(self._patience_s()):
                    await self._changed.wait()
                continue
            content = self._entries[tree_id].content
            frames = _unpack(self._path(tree_id).read_bytes() if content is None else content)
            if not await uplink.send(TreeUpload(tree_id=tree_id), frames):
                await uplink.wait_connected()
            elif (entry := self._entries.get(tree_id)) is not None:  # it may be acknowledged by now
                entry.sent_at = time.monotonic()

    def _next(self) -> str | None:
        """The oldest tree to send now: never sent, or not acknowledged for too long."""
        overdue = time.monotonic() - self._resend_s
        for tree_id, entry in islice(self._entries.items(), WINDOW_TREES):
            if entry.sent_at is None or entry.sent_at <= overdue:
                return tree_id
        return None

    def _patience_s(self) -> float:
        """Seconds until the first tree on its way is overdue."""
        sent = [e.sent_at for e in islice(self._entries.values(), WINDOW_TREES) if e.sent_at is not None]
        return max(0.0, min(sent) + self._resend_s - time.monotonic()) if sent else float("inf")

    def _recover(self) -> None:
        for draft in self._folder.glob("*.draft"):
            draft.unlink()
        for path in sorted(self._folder.glob(f"*{SUFFIX}"), key=lambda p: p.stat().st_mtime_ns):
            try:
                header = decode_header(_unpack(path.read_bytes())[0])
            except (MalformedTree, ValueError) as error:
                self.dropped["malformed"] += 1
                log.warning("unreadable tree set aside", file=str(path), reason=str(error))
                path.rename(path.with_suffix(".broken"))
                continue
            self._entries[header.tree_id] = _Entry(header.lease_id)

    def _path(self, tree_id: str) -> Path:
        return self._folder / f"{tree_id}{SUFFIX}"

    def _notice(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


def _pack(frames: Sequence[bytes]) -> bytes:
    """Frame count, frame sizes, frames."""
    return b"".join([struct.pack(f"<I{len(frames)}Q", len(frames), *map(len, frames)), *frames])


def _unpack(content: bytes) -> list[bytes]:
    """The frames of a file. Raises `ValueError` for one that was cut short."""
    try:
        (count,) = struct.unpack_from("<I", content)
        sizes = struct.unpack_from(f"<{count}Q", content, 4)
    except struct.error as error:
        raise ValueError(f"a file of {len(content)} bytes is no tree") from error
    at = 4 + 8 * count
    if at + sum(sizes) != len(content) or not count:
        raise ValueError(f"a file of {len(content)} bytes does not hold its {count} frames")
    frames = []
    for size in sizes:
        frames.append(content[at : at + size])
        at += size
    return frames
