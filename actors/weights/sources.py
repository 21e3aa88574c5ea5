"""Where weight objects come from: the hub always, and before it what is cheaper: the learner's own folder on a shared
file system, or a relay. What such a source gets wrong is counted and left for the hub; later it is tried again."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

import anyio
import anyio.to_thread
import structlog
import xxhash

from actors.weights.download import CHUNK_PATIENCE_S, BrokenTransfer, Download, Uplink, check_digest
from actors.weights.shadow import Turn
from protocols.messages import CHUNK_BYTES, Chunk, Refuse, WeightObject

log: structlog.stdlib.BoundLogger = structlog.get_logger()

REST_S: Final = 60.0
"""How long a source that failed is left alone."""
START_LIMIT_S: Final = 10.0
SLOWEST_BYTES_PER_S: Final = 20e6
"""A source beside the hub that delivers less is given up."""


class SourceFailed(Exception):
    """A source beside the hub has not, or not in time, delivered the right bytes."""


class Source(Protocol):
    """Delivers weight objects."""

    @property
    def name(self) -> str:
        """For counters and logs."""
        ...

    async def fetch(self, wanted: WeightObject, path: Path, progress: Callable[[], None]) -> None:
        """Write the object to `path` and check its digest; `progress` is called as it grows.

        Raises `SourceFailed` (the hub: `BrokenTransfer` or `ObjectGone`).
        """
        ...


class HubSource:
    """Chunks over the connection the actor has anyway."""

    name = "hub"

    def __init__(self, uplink: Uplink, *, patience_s: float = CHUNK_PATIENCE_S, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._uplink = uplink
        self._patience_s = patience_s
        self._chunk_bytes = chunk_bytes
        self._download: Download | None = None

    async def fetch(self, wanted: WeightObject, path: Path, progress: Callable[[], None]) -> None:
        """See `Source`. While the hub is away this waits for it, as everything else of the actor does."""
        self._download = Download(
            wanted, path, progress=progress, patience_s=self._patience_s, chunk_bytes=self._chunk_bytes
        )
        try:
            await self._download.run(self._uplink)
        finally:
            self._download = None

    def take(self, chunk: Chunk, content: memoryview) -> None:
        """Bytes of a weight object arrived."""
        if self._download is not None:
            self._download.take(chunk, content)

    def refuse(self, refusal: Refuse) -> bool:
        """Handle a refusal of a chunk. False when it is about something else."""
        if self._download is None or refusal.about != self._download.wanted.name:
            return False
        self._download.give_up()
        return True


class FolderSource:
    """The learner's folder of weights, on a file system this machine shares."""

    name = "folder"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def fetch(self, wanted: WeightObject, path: Path, progress: Callable[[], None]) -> None:
        """See `Source`. A file system that hangs is left behind in its thread."""
        stop = threading.Event()
        limit_s = _limit_s(wanted)
        try:
            with anyio.fail_after(limit_s):
                await anyio.to_thread.run_sync(self._copy, wanted, path, progress, stop, abandon_on_cancel=True)
        except TimeoutError as error:
            raise SourceFailed(f"{wanted.name} was not read within {limit_s:.0f} s") from error
        except (OSError, BrokenTransfer) as error:
            raise SourceFailed(str(error)) from error
        finally:
            stop.set()

    def _copy(self, wanted: WeightObject, path: Path, progress: Callable[[], None], stop: threading.Event) -> None:
        digest = xxhash.xxh3_128()
        with (self._folder / wanted.name).open("rb") as file, path.open("xb") as copy:
            while not stop.is_set() and (part := file.read(CHUNK_BYTES)):
                digest.update(part)
                copy.write(part)
                progress()
        check_digest(wanted, digest.hexdigest())


class Sources:
    """The sources of an actor, cheapest first."""

    def __init__(
        self, hub: HubSource, others: Sequence[Source] = (), *, failures: Counter[str], rest_s: float = REST_S
    ) -> None:
        self.hub = hub
        self._others = others
        self._failures = failures
        self._rest_s = rest_s
        self._resting_until_s: dict[str, float] = {}

    async def fetch(self, wanted: WeightObject, turn: Turn) -> Path:
        """The object as a new draft of the shadow. Raises `BrokenTransfer` or `ObjectGone`, the hub's failures."""
        for source in self._others:
            if self._resting_until_s.get(source.name, 0.0) <= time.monotonic():
                path = turn.draft()
                try:
                    await source.fetch(wanted, path, turn.progress)
                except SourceFailed as error:
                    turn.drop(path)
                    self._failures[source.name] += 1
                    self._resting_until_s[source.name] = time.monotonic() + self._rest_s
                    log.warning(
                        "weights left for the hub", source=source.name, reason=str(error), again_in_s=self._rest_s
                    )
                else:
                    return path
        path = turn.draft()
        await self.hub.fetch(wanted, path, turn.progress)
        return path


def _limit_s(wanted: WeightObject) -> float:
    return START_LIMIT_S + wanted.size_bytes / SLOWEST_BYTES_PER_S
