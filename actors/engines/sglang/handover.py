"""Weights on their way into servers: prepared once per version, delivered to each server. Here: as model folders."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol, Self

import anyio
import anyio.to_thread

from actors.engines.sglang.attestation import Checksums, Layout, expected_checksums
from actors.engines.sglang.client import SglangClient
from actors.engines.sglang.model import ModelFacts
from matpo.config import SglangEngine as Settings
from matpo.rooms import held, room
from protocols.weights import Weights, weights_digest, write_keyframe

MEMORY: Final = Path("/dev/shm")
WEIGHT_FILE: Final = "model.safetensors"


@dataclass(frozen=True, slots=True, eq=False)
class Parcel:
    """One version's weights, ready to be delivered to any number of servers, at any time until they are dropped."""

    version: int
    digest: str
    checksums: tuple[Checksums, ...] | None
    """What each rank of a server must report after loading; None: they are not asked."""
    folder: Path
    """Holds these weights: a Hugging Face model folder, or a PEFT folder."""
    cache_key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Requests that are sampled with these weights share keys and values with no others."""
    adapters: Mapping[str, str] = field(default_factory=dict)
    """Name of an adapter (`Lora.adapters`) → what requests must name to be sampled with it. Empty: the weights are the
    server's own."""

    def adapter_of(self, name: str | None) -> str:
        """What a request must name; empty: nothing, it is sampled with the server's own weights."""
        return "" if name is None or not self.adapters else self.adapters[name]


class Handover(Protocol):
    """A way to bring weights into servers."""

    pauses: bool
    """Whether a server must be paused while it takes weights: they replace those it samples with."""

    def check(self, weights: Weights) -> None:
        """Raise `ValueError` naming tensors a server would not know, miss or find of another shape."""
        ...

    async def prepare(self, weights: Weights, *, version: int, file: Path | None) -> Parcel:
        """Once per version, while the servers go on sampling. `file` as in `Engine.load`."""
        ...

    async def meet(self, client: SglangClient) -> None:
        """What can be done before the server is paused. Failures show in `deliver`, which makes up for it."""
        ...

    async def deliver(self, parcel: Parcel, client: SglangClient, *, flush: bool, deadline_s: float) -> None:
        """Load the weights into one paused server; `flush`: it forgets all keys and values. May be asked for several
        servers at once, and again for one that was restarted. Raises `ServerGone` or `ServerRefused`."""
        ...

    async def held(self, parcel: Parcel, client: SglangClient, *, deadline_s: float) -> bool:
        """Whether a server that took the parcel still has it; it may have been started anew. Raises like `deliver`."""
        ...

    async def retire(self, parcel: Parcel, client: SglangClient, *, deadline_s: float) -> None:
        """No request on this server uses the parcel any more, nor will one. Raises like `deliver`."""
        ...

    def keep_only(self, *parcels: Parcel) -> None:
        """Forget all others."""
        ...


class DiskHandover:
    """Model folders that a server on the same machine (or file system) loads from."""

    pauses = True

    def __init__(self, folder: Path, settings: Settings, facts: ModelFacts) -> None:
        self.folder = folder
        self._settings = settings
        self._facts = facts
        self._count = 0

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings, facts: ModelFacts) -> AsyncIterator[Self]:
        """In a `scratch_folder`."""
        with scratch_folder(settings) as folder:
            yield cls(folder, settings, facts)

    def check(self, weights: Weights) -> None:
        """See `Handover.check`."""
        self._facts.check(weights)

    async def prepare(self, weights: Weights, *, version: int, file: Path | None) -> Parcel:
        """A new folder with the model's own files and these weights."""
        return await anyio.to_thread.run_sync(self._prepare, weights, version, file)

    async def meet(self, client: SglangClient) -> None:
        """Nothing."""

    async def deliver(self, parcel: Parcel, client: SglangClient, *, flush: bool, deadline_s: float) -> None:
        """Tell the server to load the folder."""
        await client.update_from_disk(str(parcel.folder), version=parcel.version, flush=flush, deadline_s=deadline_s)

    async def held(self, parcel: Parcel, client: SglangClient, *, deadline_s: float) -> bool:
        """By the version the server names."""
        return (await client.model_info(deadline_s=deadline_s)).weight_version == str(parcel.version)

    async def retire(self, parcel: Parcel, client: SglangClient, *, deadline_s: float) -> None:
        """Nothing: the server has overwritten it."""

    def keep_only(self, *parcels: Parcel) -> None:
        """Remove all other folders."""
        kept = {parcel.folder for parcel in parcels}
        for other in self.folder.iterdir():
            if other.is_dir() and other not in kept:
                shutil.rmtree(other, ignore_errors=True)

    def _prepare(self, weights: Weights, version: int, file: Path | None) -> Parcel:
        self._count += 1
        target = self.folder / f"{self._count}-version-{version}"
        target.mkdir()
        for own in self._facts.folder.resolve().iterdir():
            if own.is_file() and not own.name.endswith((".safetensors", ".safetensors.index.json")):
                (target / own.name).symlink_to(own)
        if file is None or not _linked(file, target / WEIGHT_FILE):
            write_keyframe(target / WEIGHT_FILE, weights, version=version)
        sums = None
        if self._settings.attest:
            sums = expected_checksums(weights, Layout.of(self._facts, self._settings))
        return Parcel(version, weights_digest(weights), sums, target)


@contextmanager
def scratch_folder(settings: Settings) -> Iterator[Path]:
    """In `settings.scratch`, or in memory where the system offers a folder there, and there what killed actors left is
    removed first. Removed at the end."""
    if settings.scratch is not None:  # perhaps on a network's disk, where folders cannot be locked
        with tempfile.TemporaryDirectory(
            prefix="matpo-weights-", dir=settings.scratch, ignore_cleanup_errors=True
        ) as name:
            yield Path(name)
        return
    usable = MEMORY.is_dir() and os.access(MEMORY, os.W_OK)
    parent = MEMORY if usable else Path(tempfile.gettempdir())
    with held(room(parent, "matpo-weights", uuid.uuid4().hex), setting="actor.engine.scratch") as folder:
        yield folder


def _linked(file: Path, target: Path) -> bool:
    """Whether `target` could be made another name of `file`: only on one file system, and not on all of them."""
    try:
        target.hardlink_to(file)
    except OSError:
        return False
    return True
