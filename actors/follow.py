"""Follows the learner's weights: pulls the smallest chain of objects, checks every byte, and hands them to the engine.

Playing goes on meanwhile. Whatever does not fit (a damaged file, a delta for other weights, another digest than
announced) is counted and answered by starting again from a keyframe.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import anyio
import anyio.to_thread
import structlog

from actors.engines.engine import Engine, EngineFailure
from matpo.errors import UserError
from protocols.delta import BadDelta, apply_delta
from protocols.messages import Chunk, ChunkRequest, Refuse, WeightObject, WeightsLoaded, WeightsReady
from protocols.weights import BadWeights, Weights, covering, file_digest, read_keyframe, weights_digest

log: structlog.stdlib.BoundLogger = structlog.get_logger()

CHUNK_BYTES = 4 * 2**20
CHUNKS_IN_FLIGHT = 8
CHUNK_PATIENCE_S = 10.0
"""A chunk that did not come for so long is asked for again (the hub may have been restarted)."""


class BrokenTransfer(ValueError):
    """What arrived is not what was announced."""


class ObjectGone(Exception):
    """The hub no longer has an object of the chain; the next announcement names another."""


class Uplink(Protocol):
    """What following needs of `protocols.channel.HubClient`."""

    async def send(self, message: ChunkRequest | WeightsLoaded) -> bool: ...

    async def wait_connected(self) -> None: ...


class Download:
    """One object on its way: chunks may arrive in any order and twice."""

    def __init__(self, wanted: WeightObject, path: Path, *, patience_s: float) -> None:
        self.wanted = wanted
        self.gone = False
        self._path = path
        self._patience_s = patience_s
        self._sent: dict[int, float] = {}
        """Offset asked for → when (monotonic seconds)."""
        self._left = list(range(0, wanted.size_bytes, CHUNK_BYTES))[::-1]
        self._changed = anyio.Event()
        self._descriptor = -1

    async def run(self, uplink: Uplink) -> Path:
        """Pull the whole file and check it. Raises `BrokenTransfer` or `ObjectGone`."""
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            while self._left or self._sent:
                if self.gone:
                    raise ObjectGone(self.wanted.name)
                changed = self._changed  # taken before asking: what arrives meanwhile must wake us
                await self._ask(uplink)
                with anyio.move_on_after(self._patience_s):
                    await changed.wait()
        finally:
            os.close(self._descriptor)
            self._descriptor = -1
        digest = await anyio.to_thread.run_sync(file_digest, self._path)
        if digest != self.wanted.digest:
            raise BrokenTransfer(f"{self.wanted.name} has digest {digest}, announced was {self.wanted.digest}")
        return self._path

    def take(self, chunk: Chunk, content: memoryview) -> None:
        """A chunk arrived; one that was not asked for, or of another size, is ignored and asked for again later."""
        size = min(CHUNK_BYTES, self.wanted.size_bytes - chunk.offset)
        if chunk.offset in self._sent and content.nbytes == size and self._descriptor >= 0:
            os.pwrite(self._descriptor, content, chunk.offset)
            del self._sent[chunk.offset]
            self.notice()

    def notice(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def _ask(self, uplink: Uplink) -> None:
        """Keep `CHUNKS_IN_FLIGHT` requests under way."""
        overdue = time.monotonic() - self._patience_s
        again = [offset for offset, sent_at in self._sent.items() if sent_at <= overdue]
        while again or (self._left and len(self._sent) < CHUNKS_IN_FLIGHT):
            offset = again.pop() if again else self._left.pop()
            size = min(CHUNK_BYTES, self.wanted.size_bytes - offset)
            self._sent[offset] = time.monotonic()
            request = ChunkRequest(name=self.wanted.name, offset=offset, size_bytes=size)
            while not await uplink.send(request):
                await uplink.wait_connected()


class Follower:
    """Keeps the engine at the newest announced weights."""

    def __init__(
        self,
        folder: Path,
        *,
        engine: Engine,
        uplink: Uplink,
        loaded: Sequence[Callable[[], None]] = (),
        patience_s: float = CHUNK_PATIENCE_S,
    ) -> None:
        """`folder` holds files on their way. `loaded` are called right after every swap."""
        self.failures: Counter[str] = Counter()
        """What went wrong and was repaired, by kind."""
        self._folder = folder
        self._engine = engine
        self._uplink = uplink
        self._loaded = loaded
        self._patience_s = patience_s
        self._newest: WeightsReady | None = None
        self._fresh = anyio.Event()
        self._download: Download | None = None
        self._shadow: Weights = {}
        self._held: int | None = None
        """Version of the shadow."""

    @property
    def wanted_version(self) -> int:
        """The newest announced version; -1 before the first."""
        return -1 if self._newest is None else self._newest.version

    def announce(self, ready: WeightsReady) -> None:
        """New weights can be pulled, or are still the newest: repeated announcements are also the clock of retries."""
        if ready.version >= self.wanted_version:
            self._newest = ready
            self._fresh.set()

    def take(self, chunk: Chunk, content: memoryview) -> None:
        """Bytes of a weight object arrived."""
        if self._download is not None and self._download.wanted.name == chunk.name:
            self._download.take(chunk, content)

    def refuse(self, refusal: Refuse) -> bool:
        """Handle a refusal of a chunk. False when it is about something else."""
        if self._download is None or refusal.about != self._download.wanted.name:
            return False
        self._download.gone = True
        self._download.notice()
        return True

    async def run(self) -> None:
        """Follow announcements forever. Raises `UserError` when the learner trains another model than this actor's."""
        self._folder.mkdir(parents=True, exist_ok=True)
        while True:
            await self._fresh.wait()
            self._fresh = anyio.Event()
            ready = self._newest
            if ready is not None and ready.version > self._engine.version:
                await self._follow(ready)

    async def _follow(self, ready: WeightsReady) -> None:
        try:
            if await self._bring_shadow_to(ready):
                await self._load(ready)
        except (BrokenTransfer, BadDelta, BadWeights) as error:
            self.failures["broken"] += 1
            self._shadow, self._held = {}, None
            log.warning("weights broken, starting from a keyframe", version=ready.version, reason=str(error))
        except ObjectGone as error:
            self.failures["gone"] += 1
            log.info("weight object gone", object=str(error))
        except EngineFailure as error:
            self.failures["engine"] += 1
            log.warning("engine took no weights", version=ready.version, reason=str(error))

    async def _bring_shadow_to(self, ready: WeightsReady) -> bool:
        """Pull and apply the chain. False when a newer announcement arrived in between: then plan anew from here."""
        try:
            chain = covering(ready.objects, self._held)
        except ValueError as error:
            raise BrokenTransfer(str(error)) from error
        for wanted in chain:
            if self.wanted_version > ready.version:
                self._fresh.set()
                return False
            if Path(wanted.name).name != wanted.name:
                raise BrokenTransfer(f"{wanted.name!r} is no file name")
            self._download = Download(wanted, self._folder / wanted.name, patience_s=self._patience_s)
            try:
                path = await self._download.run(self._uplink)
                await anyio.to_thread.run_sync(self._apply, wanted, path)
            finally:
                self._download = None
                # A mapped file lives on until its last tensor is forgotten.
                (self._folder / wanted.name).unlink(missing_ok=True)
        return True

    def _apply(self, wanted: WeightObject, path: Path) -> None:
        if wanted.base is None:
            self._shadow = read_keyframe(path)
        else:
            self._shadow = apply_delta(path, self._shadow, base_version=wanted.base)
        self._held = wanted.version

    async def _load(self, ready: WeightsReady) -> None:
        digest = await anyio.to_thread.run_sync(weights_digest, self._shadow)
        if digest != ready.digest:
            raise BrokenTransfer(f"weights {ready.version} have digest {digest}, announced was {ready.digest}")
        try:
            report = await self._engine.load(self._shadow, version=ready.version)
        except ValueError as error:
            raise UserError(f"the learner's {error}; give actor and learner the same model.path") from error
        for call in self._loaded:
            call()
        if report.digest != ready.digest:
            raise BrokenTransfer(f"engine holds digest {report.digest}, announced was {ready.digest}")
        log.info("weights loaded", version=report.version, pause_s=round(report.pause_s, 6))
        await self._uplink.send(WeightsLoaded(version=report.version, digest=report.digest, pause_s=report.pause_s))
