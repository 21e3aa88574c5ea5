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

from actors.greet import greet
from actors.weights.download import CHUNK_PATIENCE_S, BrokenTransfer, Download, ObjectGone, Uplink, check_digest
from actors.weights.shadow import Turn
from matpo.config import ActorWeights
from matpo.errors import UserError
from protocols.channel import HubClient
from protocols.keys import ActorKeys
from protocols.messages import CHUNK_BYTES, PROTOCOL, Chunk, Drain, PullHello, Refuse, WeightObject
from protocols.refusals import ChannelError, check_endpoint, is_local

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
        self._gone = False
        self._changed = anyio.Event()

    async def fetch(self, wanted: WeightObject, path: Path, progress: Callable[[], None]) -> None:
        """See `Source`. While the hub is away this waits for it, as everything else of the actor does."""
        with Download(wanted, path, patience_s=self._patience_s, chunk_bytes=self._chunk_bytes) as download:
            self._download, self._gone = download, False
            try:
                while not download.complete:
                    if self._gone:
                        raise ObjectGone(wanted.name)
                    changed = self._changed  # taken before asking: what arrives meanwhile must wake us
                    await download.ask(self._uplink)
                    with anyio.move_on_after(download.patience_s):
                        await changed.wait()
                        progress()
            finally:
                self._download = None
            await download.check()

    def take(self, chunk: Chunk, content: memoryview) -> None:
        """Bytes of a weight object arrived."""
        if self._download is not None and self._download.take(chunk, content):
            self._notice()

    def refuse(self, refusal: Refuse) -> bool:
        """Handle a refusal of a chunk. False when it is about something else."""
        if self._download is None or refusal.about != self._download.wanted.name:
            return False
        if refusal.reason != "too_fast":  # that one is asked for again in a while
            self._gone = True
            self._notice()
        return True

    def _notice(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


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
        left = wanted.size_bytes
        with (self._folder / wanted.name).open("rb") as file, path.open("xb") as copy:
            while not stop.is_set() and (part := file.read(min(left, CHUNK_BYTES))):
                digest.update(part)
                left -= copy.write(part)
                progress()
        check_digest(wanted, digest.hexdigest())


class RelaySource:
    """A `matpo-relay`; the link to it lives as long as one object takes."""

    name = "relay"

    def __init__(
        self,
        endpoint: str,
        *,
        run: str,
        puller_id: str,
        keys: ActorKeys | None,
        patience_s: float = CHUNK_PATIENCE_S,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """`patience_s`: how long it may take to let us in, and after the last chunk to send another."""
        self._endpoint = endpoint
        self._keys = keys
        self._hello = PullHello(protocol=PROTOCOL, puller_id=puller_id, run=run)
        self._patience_s = patience_s
        self._chunk_bytes = chunk_bytes

    async def fetch(self, wanted: WeightObject, path: Path, progress: Callable[[], None]) -> None:
        """See `Source`."""
        limit_s = _limit_s(wanted)
        link = HubClient.connect(self._endpoint, keys=self._keys, deadline_s=self._patience_s)
        try:
            with anyio.fail_after(limit_s):
                async with link as client:
                    await greet(client, self._hello, deadline_s=self._patience_s)
                    with Download(wanted, path, chunk_bytes=self._chunk_bytes) as download:
                        await self._pull(client, download, progress)
                        await download.check()
        except TimeoutError as error:
            seconds = f"nothing for {self._patience_s:g} s, or not all within {limit_s:.0f} s"
            raise SourceFailed(f"{wanted.name} stopped coming: {seconds}") from error
        except (ChannelError, UserError, BrokenTransfer) as error:
            raise SourceFailed(str(error)) from error

    async def _pull(self, client: HubClient, download: Download, progress: Callable[[], None]) -> None:
        while not download.complete:
            with anyio.fail_after(self._patience_s):
                await download.ask(client)
                message, frames = await client.receive()
            match message:
                case Chunk() if len(frames) == 1:
                    download.take(message, frames[0])
                    progress()
                case Refuse(detail=detail) | Drain(reason=detail):
                    raise SourceFailed(detail)
                case _:
                    continue


class Sources:
    """The sources of an actor, cheapest first."""

    def __init__(self, hub: HubSource, others: Sequence[Source] = (), *, rest_s: float = REST_S) -> None:
        """`others` are asked before the hub; one that failed is left alone for `rest_s` seconds."""
        self.failures: Counter[str] = Counter()
        """By source."""
        self.hub = hub
        self._others = others
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
                    self.failures[source.name] += 1
                    self._resting_until_s[source.name] = time.monotonic() + self._rest_s
                    log.warning(
                        "weights left for the hub", source=source.name, reason=str(error), again_in_s=self._rest_s
                    )
                else:
                    return path
        path = turn.draft()
        await self.hub.fetch(wanted, path, turn.progress)
        return path


def beside_hub(settings: ActorWeights, *, run: str, puller_id: str, keys: ActorKeys | None) -> list[Source]:
    """The configured sources, cheapest first. Raises `ChannelError` for a relay's address that is none."""
    sources: list[Source] = []
    if settings.folder is not None:
        sources.append(FolderSource(settings.folder))
    if settings.relay is not None:
        if keys is not None and settings.relay_key is None and not is_local(settings.relay):
            raise ChannelError(
                f"relay {settings.relay} is not on this machine and its key is not known; set actor.weights.relay_key"
                " to the public key that `matpo keys show` prints there"
            )
        relay_keys = None if keys is None or settings.relay_key is None else ActorKeys(keys.pair, settings.relay_key)
        check_endpoint(settings.relay, relay_keys)
        sources.append(RelaySource(settings.relay, run=run, puller_id=puller_id, keys=relay_keys))
    return sources


def _limit_s(wanted: WeightObject) -> float:
    return START_LIMIT_S + wanted.size_bytes / SLOWEST_BYTES_PER_S
