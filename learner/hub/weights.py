"""The weight files of a run: what actors can pull, in pieces; what nobody needs is deleted."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog
from pydantic import TypeAdapter

from learner.hub.journal import Journal, integer, real, text
from protocols.chunks import ChunkCache
from protocols.messages import Chunk, ChunkRequest, Publish, Refuse, WeightObject, WeightsLoaded, WeightsReady
from protocols.records import Record

log: structlog.stdlib.BoundLogger = structlog.get_logger()

KEYFRAMES_KEPT: Final = 3
"""The newest for joiners, the others for whoever is in the middle of a download or a few steps behind."""

READ_BYTES: Final = 128 * 2**20
"""Pieces kept in memory: actors pull the same ones at about the same time."""

_OBJECTS: Final = TypeAdapter(tuple[WeightObject, ...])


@dataclass(frozen=True, slots=True)
class Published:
    """One version of the weights."""

    version: int
    digest: str
    objects: tuple[WeightObject, ...]


class Swap(Record):
    """A line of stage `weights`: an actor's engine took new weights."""

    actor_id: str
    version: int
    pause_s: float
    """How long its generation stood still."""
    behind_s: float
    """From the publication to here."""


class WeightStore:
    """What has been published, from the journal, and the files behind it."""

    def __init__(self, journal: Journal, folder: Path) -> None:
        self._journal = journal
        self._folder = folder
        folder.mkdir(exist_ok=True)
        self._read = ChunkCache(READ_BYTES)
        self.latest: Published | None = None
        self._digests: set[tuple[int, str]] = set()
        self._published_at: dict[int, float] = {}
        """Version → Unix time."""
        self._available: tuple[WeightObject, ...] = ()
        self._unneeded: list[str] = []
        self.served_bytes = 0
        """Handed out in chunks since this hub started."""
        for row in journal.rows("SELECT version, digest, objects, published_at FROM publications ORDER BY seq"):
            self._add(Published(integer(row[0]), text(row[1]), _OBJECTS.validate_json(text(row[2]))), at=real(row[3]))
        self._forget_missing()

    def publish(self, message: Publish, *, at: float) -> Refuse | None:
        """Take note of a new version, inside a transaction. A repeated message changes nothing."""
        if (message.version, message.digest) in self._digests:
            return None
        if any(version == message.version for version, _ in self._digests):
            return Refuse(
                reason="unexpected",
                detail=f"version {message.version} was published before with another digest; restart the trainer",
                about=str(message.version),
            )
        missing = [entry.name for entry in message.objects if not self._is_there(entry)]
        if missing:
            return Refuse(
                reason="unknown_object",
                detail=f"weight files {missing} are not in {self._folder} in their announced size; write them first",
                about=str(message.version),
            )
        if self._available:  # the files of older ones are deleted: their names only make the journal longer
            oldest = self._available[0].version
            query = "UPDATE publications SET objects = '[]' WHERE objects != '[]' AND version < ?"
            self._journal.execute(query, (oldest,))
        objects = _OBJECTS.dump_json(message.objects).decode()
        self._journal.insert(
            "INSERT INTO publications (version, digest, objects, published_at) VALUES (?, ?, ?, ?)",
            (message.version, message.digest, objects, at),
        )
        self._add(Published(message.version, message.digest, message.objects), at=at)
        return None

    def knows(self, version: int, digest: str) -> bool:
        """Whether these weights were ever published."""
        return (version, digest) in self._digests

    def swap(self, message: WeightsLoaded, *, actor_id: str, at: float) -> Swap | None:
        """What an actor's swap amounted to; None for weights that were never published."""
        if not self.knows(message.version, message.digest):
            return None
        behind_s = max(0.0, at - self._published_at[message.version])
        return Swap(actor_id=actor_id, version=message.version, pause_s=message.pause_s, behind_s=round(behind_s, 4))

    def announcement(self) -> WeightsReady | None:
        """What to tell actors; None before the first publication."""
        if self.latest is None:
            return None
        return WeightsReady(version=self.latest.version, digest=self.latest.digest, objects=self._available)

    def chunk(self, request: ChunkRequest) -> tuple[Chunk, bytes | memoryview] | Refuse:
        """A piece of a file. One that was removed or cut short on disk is not offered any more."""
        entry = next((known for known in self._available if known.name == request.name), None)
        if entry is None:
            return Refuse(
                reason="unknown_object",
                detail=f"weight object {request.name!r} is not kept (any more); follow the next WeightsReady",
                about=request.name,
            )
        if request.offset >= entry.size_bytes:
            return Refuse(
                reason="malformed",
                detail=f"chunk at {request.offset} of {request.name!r}: the object has {entry.size_bytes} bytes",
                about=request.name,
            )
        piece = self._piece(entry, request.offset, min(request.size_bytes, entry.size_bytes - request.offset))
        if piece is None:
            self._available = tuple(known for known in self._available if known is not entry)
            log.warning("weight file was removed or cut short", file=str(self._folder / entry.name))
            detail = f"weight object {entry.name!r} is damaged where the hub is; follow the next WeightsReady"
            return Refuse(reason="unknown_object", detail=detail, about=entry.name)
        self.served_bytes += len(piece)
        return Chunk(name=entry.name, offset=request.offset), piece

    def forget_read(self) -> None:
        """Read every piece from its file again."""
        self._read = ChunkCache(READ_BYTES)

    def delete_old(self) -> list[str]:
        """Remove files that no announcement names; returns their names. Call after the transaction is on disk."""
        gone = []
        for name in self._unneeded:
            path = self._folder / name
            if path.is_file():
                path.unlink()
                gone.append(name)
        self._unneeded.clear()
        return gone

    def delete_strays(self) -> None:
        """Remove files that no publication names: drafts of killed trainers, and what they never got to announce. Call
        when a trainer begins, which writes anew what it publishes."""
        known = {entry.name for entry in self._available}.union(self._unneeded)
        for path in self._folder.iterdir():
            if path.name not in known and path.is_file():
                path.unlink(missing_ok=True)  # its trainer may just have given it its name

    def _add(self, published: Published, *, at: float) -> None:
        self.latest = published
        self._published_at[published.version] = at
        self._digests.add((published.version, published.digest))
        known = {entry.name: entry for entry in (*self._available, *published.objects)}
        objects = list(known.values())
        keyframes = [place for place, entry in enumerate(objects) if entry.kind == "keyframe"]
        first = keyframes[-KEYFRAMES_KEPT] if len(keyframes) >= KEYFRAMES_KEPT else 0
        self._available = tuple(objects[first:])
        self._unneeded += [entry.name for entry in objects[:first]]

    def _forget_missing(self) -> None:
        self._available = tuple(entry for entry in self._available if self._is_there(entry))

    def _is_there(self, entry: WeightObject) -> bool:
        path = self._folder / entry.name
        return path.parent == self._folder and path.is_file() and path.stat().st_size == entry.size_bytes

    def _piece(self, entry: WeightObject, offset: int, size_bytes: int) -> bytes | memoryview | None:
        """So many bytes of a file; None if they are not all there. Read, not mapped: whoever cuts a mapped file short
        ends the process that looks at it."""
        place = (entry.name, offset)
        known = self._read.get(place)
        if known is not None and len(known) >= size_bytes:
            return memoryview(known)[:size_bytes]
        try:
            descriptor = os.open(self._folder / entry.name, os.O_RDONLY)
        except OSError:
            return None
        try:
            piece = os.pread(descriptor, size_bytes, offset)
        finally:
            os.close(descriptor)
        if len(piece) != size_bytes:
            return None
        self._read.put(place, piece)
        return piece
