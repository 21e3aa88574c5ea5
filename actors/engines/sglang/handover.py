"""Weights on their way into servers: prepared once per version, delivered to each server, and checked by the checksums
a server must report afterwards."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol, Self

import anyio
import anyio.to_thread
import numpy as np

from actors.engines.sglang.client import SglangClient
from actors.engines.sglang.model import EMBEDDING, HEAD, ModelFacts
from matpo.config import SglangEngine as Settings
from protocols.weights import Tensor, WeightDtype, Weights, raw_bytes, weights_digest, write_keyframe

MEMORY: Final = Path("/dev/shm")
VOCABULARY_MULTIPLE: Final = 64
"""The server pads the vocabulary of embedding and head with zeros to a multiple of this."""
FUSED: Final = re.compile(r"(.*\.)(?:([qkv])_proj|(gate|up)_proj)\.(weight|bias)")


@dataclass(frozen=True, slots=True, eq=False)
class Parcel:
    """One version's weights, ready to be delivered to any number of servers, at any time until they are dropped."""

    version: int
    digest: str
    checksums: Mapping[str, str] | None
    """What a server must report after loading; None: it is not asked."""
    folder: Path
    """A Hugging Face model folder with these weights."""
    cache_key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Requests that are sampled with these weights share keys and values with no others."""


class Handover(Protocol):
    """A way to bring weights into servers."""

    async def prepare(self, weights: Weights, *, version: int, file: Path | None) -> Parcel:
        """Once per version, while the servers go on sampling. `file` as in `Engine.load`."""
        ...

    async def deliver(self, parcel: Parcel, client: SglangClient, *, flush: bool, deadline_s: float) -> None:
        """Load the weights into one paused server; `flush`: it forgets all keys and values. May be asked for several
        servers at once, and again for one that was restarted. Raises `ServerGone` or `ServerRefused`."""
        ...

    def keep_only(self, *parcels: Parcel) -> None:
        """Forget all others."""
        ...


class DiskHandover:
    """Model folders that a server on the same machine (or file system) loads from."""

    def __init__(self, folder: Path, settings: Settings, facts: ModelFacts) -> None:
        self.folder = folder
        self._settings = settings
        self._facts = facts
        self._count = 0

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings, facts: ModelFacts) -> AsyncIterator[Self]:
        """In `settings.scratch`, or in memory where the system offers a folder there. Removed at the end."""
        parent = settings.scratch or (MEMORY if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) else None)
        with tempfile.TemporaryDirectory(prefix="matpo-weights-", dir=parent, ignore_cleanup_errors=True) as folder:
            yield cls(Path(folder), settings, facts)

    async def prepare(self, weights: Weights, *, version: int, file: Path | None) -> Parcel:
        """A new folder with the model's own files and these weights."""
        return await anyio.to_thread.run_sync(self._prepare, weights, version, file)

    async def deliver(self, parcel: Parcel, client: SglangClient, *, flush: bool, deadline_s: float) -> None:
        """Tell the server to load the folder."""
        await client.update_from_disk(str(parcel.folder), version=parcel.version, flush=flush, deadline_s=deadline_s)

    def keep_only(self, *parcels: Parcel) -> None:
        """Remove all other folders. The one before the newest must stay: a server falls back to it when loading
        fails."""
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
        if file is None or not _linked(file, target / "model.safetensors"):
            write_keyframe(target / "model.safetensors", weights, version=version)
        sums = None
        if self._settings.attested:
            sums = expected_checksums(weights, dtype=self._settings.dtype, tied=self._facts.tied)
        return Parcel(version, weights_digest(weights), sums, target)


def _linked(file: Path, target: Path) -> bool:
    """Whether `target` could be made another name of `file`: only on one file system, and not on all of them."""
    try:
        target.hardlink_to(file)
    except OSError:
        return False
    return True


def expected_checksums(weights: Weights, *, dtype: WeightDtype, tied: bool) -> Mapping[str, str]:
    """Server's tensor name → first 8 bytes of SHA-256 in hex, as a server on the CPU computes them.

    The server holds query, key and value projections as one tensor, gate and up projections as another, everything
    in its own number format. Fits decoders that fuse just those: Llama, Qwen2, Qwen3 and their relatives.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        found = FUSED.fullmatch(name)
        if found is None:
            parts[name] = {"": tensor}
        elif found[2]:
            parts.setdefault(f"{found[1]}qkv_proj.{found[4]}", {})[str("qkv".index(found[2]))] = tensor
        else:
            parts.setdefault(f"{found[1]}gate_up_proj.{found[4]}", {})[found[3]] = tensor
    sums = {}
    for name, tensors in parts.items():
        digest = hashlib.sha256()
        for key in sorted(tensors):
            digest.update(raw_bytes(converted(tensors[key], dtype)))
        if name in (EMBEDDING, HEAD):
            digest.update(bytes(_padding(tensors[""], dtype)))
        sums[name] = digest.hexdigest()[:16]
    if tied:
        sums[HEAD] = sums[EMBEDDING]
    return sums


def first_difference(expected: Mapping[str, str], reported: Mapping[str, str], *, tied: bool) -> str | None:
    """The name of a tensor the server holds otherwise, lacks, or holds without our knowing; None when all agree."""
    names: Iterable[str] = sorted(set(expected) | set(reported))
    for name in names:
        if name == HEAD and tied and name not in reported:
            continue
        if expected.get(name) != reported.get(name):
            return name
    return None


def converted(tensor: Tensor, dtype: WeightDtype) -> Tensor:
    """In another number format, as torch converts: to bfloat16 by rounding to nearest, ties to even."""
    if tensor.dtype == dtype:
        return tensor
    if dtype == "float32":
        return Tensor("float32", (tensor.data.astype(np.uint32) << 16).view(np.float32))
    bits = tensor.data.view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
    return Tensor("bfloat16", np.where(np.isnan(tensor.data), np.uint16(0x7FC0), rounded))


def _padding(tensor: Tensor, dtype: WeightDtype) -> int:
    """Bytes of zeros behind the vocabulary's last row."""
    rows: int = tensor.data.shape[0]
    width: int = tensor.data.shape[1]
    return -rows % VOCABULARY_MULTIPLE * width * (4 if dtype == "float32" else 2)
