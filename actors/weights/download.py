"""One weight object, pulled in chunks from whoever has it. Credits bound what is under way: a slow puller slows only
itself, and what was lost on the way is asked for again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import anyio
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
    """One object on its way: chunks may arrive in any order and twice."""

    def __init__(
        self,
        wanted: WeightObject,
        path: Path,
        *,
        progress: Callable[[], None],
        patience_s: float = CHUNK_PATIENCE_S,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """`path` is written anew; `progress` is called when chunks have arrived, and may raise to end the download."""
        self.wanted = wanted
        self._path = path
        self._progress = progress
        self._patience_s = patience_s
        self._chunk_bytes = chunk_bytes
        self._gone = False
        self._sent: set[int] = set()
        """Offsets asked for."""
        self._left = list(range(0, wanted.size_bytes, chunk_bytes))[::-1]
        self._moved_s = 0.0
        """When something was last asked for anew or arrived, monotonic."""
        self._changed = anyio.Event()
        self._descriptor = -1

    async def run(self, uplink: Uplink) -> None:
        """Pull the whole file and check it. Raises `BrokenTransfer` or `ObjectGone`."""
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            while self._left or self._sent:
                if self._gone:
                    raise ObjectGone(self.wanted.name)
                changed = self._changed  # taken before asking: what arrives meanwhile must wake us
                await self._ask(uplink)
                with anyio.move_on_after(self._patience_s):
                    await changed.wait()
                    self._progress()
        finally:
            os.close(self._descriptor)
            self._descriptor = -1
        check_digest(self.wanted, await anyio.to_thread.run_sync(file_digest, self._path))

    def take(self, chunk: Chunk, content: memoryview) -> None:
        """A chunk arrived; one that was not asked for, or of another size, is ignored and asked for again later."""
        expected = chunk.name == self.wanted.name and chunk.offset in self._sent
        if expected and content.nbytes == self._size(chunk.offset) and self._descriptor >= 0:
            os.pwrite(self._descriptor, content, chunk.offset)
            self._sent.remove(chunk.offset)
            self._moved_s = time.monotonic()
            self._notice()

    def give_up(self) -> None:
        """Whoever was asked says that the object is gone."""
        self._gone = True
        self._notice()

    def _notice(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    def _size(self, offset: int) -> int:
        return min(self._chunk_bytes, self.wanted.size_bytes - offset)

    async def _ask(self, uplink: Uplink) -> None:
        """Keep `CHUNKS_IN_FLIGHT` requests under way."""
        again: list[int] = []
        if self._sent and time.monotonic() - self._moved_s >= self._patience_s:
            again = sorted(self._sent)
            self._patience_s *= 2
        while again or (self._left and len(self._sent) < CHUNKS_IN_FLIGHT):
            offset = again.pop() if again else self._left.pop()
            self._sent.add(offset)
            self._moved_s = time.monotonic()
            request = ChunkRequest(name=self.wanted.name, offset=offset, size_bytes=self._size(offset))
            while not await uplink.send(request):
                await uplink.wait_connected()
