"""Pieces of weight objects kept in memory for those who ask for the same a moment later."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

Place = tuple[str, int]
"""A chunk: object and offset."""


@dataclass(slots=True)
class ChunkCache:
    """The chunks used last, up to so many bytes."""

    limit_bytes: int
    held_bytes: int = 0
    _chunks: OrderedDict[Place, bytes | memoryview] = field(default_factory=OrderedDict)

    def get(self, place: Place) -> bytes | memoryview | None:
        """The chunk, if it is still here."""
        if place in self._chunks:
            self._chunks.move_to_end(place)
        return self._chunks.get(place)

    def put(self, place: Place, content: bytes | memoryview) -> None:
        """Keep a chunk; those not used for longest go."""
        former = self._chunks.pop(place, None)
        self._chunks[place] = content
        self.held_bytes += len(content) - (0 if former is None else len(former))
        while self.held_bytes > self.limit_bytes and len(self._chunks) > 1:
            _, dropped = self._chunks.popitem(last=False)
            self.held_bytes -= len(dropped)
