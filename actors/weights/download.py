"""One weight object, pulled in chunks from whoever has it. Credits bound what is under way: a slow puller slows only
itself, and what was lost on the way is asked for again."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import anyio.to_thread

from protocols.messages import CHUNK_BYTES, Chunk, ChunkRequest, WeightObject
from protocols.weights import file_digest

CHUNKS_IN_FLIGHT = 8
CHUNK_PATIENCE_S = 10.0
"""When nothing came for so long, chunks are asked for again: whoever was asked may have been restarted. Doubled every
time, because over a slow line nothing may have been lost at all."""


class BrokenTransfer(ValueError):
    """What arrived is not what was announced."""


class ObjectGone(Exception):
    """Whoever was asked no longer has the object."""


class Uplink(Protocol):
    """What pulling needs of `protocols.channel.HubClient`."""

    async def send(self, message: ChunkRequest) -> bool: ...

    async def wait_connected(self) -> None: ...


def check_digest(wanted: WeightObject, found: str) -> None:
    """Raise `BrokenTransfer` unless the bytes are the object's."""
    if found != wanted.digest:
        raise BrokenTransfer(f"{wanted.name} has digest {found}, announced was {wanted.digest}")


class Download:
    """One object on its way: chunks may arrive in any order and twice. Open it as a context."""

    def __init__(
        self, wanted: WeightObject, path: Path, *, patience_s: float = CHUNK_PATIENCE_S, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        """`path` is written anew. Entering raises `OSError` when there is no room for the object."""
        self.wanted = wanted
        self.patience_s = patience_s
        self._path = path
        self._chunk_bytes = chunk_bytes
        self._asked: set[int] = set()
        """Offsets under way."""
        self._left = list(range(0, wanted.size_bytes, chunk_bytes))[::-1]
        self._moved_s = 0.0
        """When something was last asked for or arrived, monotonic."""
        self._descriptor = -1

    def __enter__(self) -> Self:
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        # A lack of room shows here, and not in whoever happens to receive the chunk that does not fit.
        os.posix_fallocate(self._descriptor, 0, max(self.wanted.size_bytes, 1))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    @property
    def complete(self) -> bool:
        """Whether every chunk is there; what is in them is for `check` to say."""
        return not self._left and not self._asked

    async def ask(self, uplink: Uplink) -> None:
        """Keep `CHUNKS_IN_FLIGHT` requests under way, and repeat them when nothing came for long."""
        again: list[int] = []
        if self._asked and time.monotonic() - self._moved_s >= self.patience_s:
            again = sorted(self._asked)
            self.patience_s *= 2
        while again or (self._left and len(self._asked) < CHUNKS_IN_FLIGHT):
            offset = again.pop() if again else self._left.pop()
            self._asked.add(offset)
            self._moved_s = time.monotonic()
            request = ChunkRequest(name=self.wanted.name, offset=offset, size_bytes=self._size(offset))
            while not await uplink.send(request):
                await uplink.wait_connected()

    def take(self, chunk: Chunk, content: memoryview) -> bool:
        """A chunk arrived. False: it was not asked for, or has another size; if need be it is asked for again later."""
        expected = chunk.name == self.wanted.name and chunk.offset in self._asked
        if not expected or content.nbytes != self._size(chunk.offset):
            return False
        os.pwrite(self._descriptor, content, chunk.offset)
        self._asked.remove(chunk.offset)
        self._moved_s = time.monotonic()
        return True

    async def check(self) -> None:
        """Compare the whole with the object's digest. Raises `BrokenTransfer`."""
        check_digest(self.wanted, await anyio.to_thread.run_sync(file_digest, self._path))

    def _size(self, offset: int) -> int:
        return min(self._chunk_bytes, self.wanted.size_bytes - offset)
