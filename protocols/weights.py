"""Named tensors as they travel from the learner to the engines, their identity, and the keyframe file that holds them
whole: the safetensors layout, so that any tool reads it. (Ours, because numpy has no bfloat16 and safetensors.numpy
refuses it.)"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple, Self

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError

from protocols.messages import WeightObject
from protocols.records import Record

WeightDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """One parameter. bfloat16 is held as its bit pattern in uint16, because numpy has no such type."""

    dtype: WeightDtype
    data: NDArray[np.float32] | NDArray[np.uint16]
    """C-contiguous, in the parameter's shape."""

    def __post_init__(self) -> None:
        expected = np.float32 if self.dtype == "float32" else np.uint16
        if self.data.dtype != expected or not self.data.flags.c_contiguous:
            raise ValueError(f"a {self.dtype} tensor must be C-contiguous {expected.__name__}, got {self.data.dtype}")


Weights = Mapping[str, Tensor]
"""Hugging Face parameter name → tensor. Tied parameters appear once."""


class TensorIdentity(NamedTuple):
    """What tells one tensor from another."""

    name: str
    dtype: WeightDtype
    shape: tuple[int, ...]
    digest: str
    """xxh3-128 of the bytes, in hex."""


def tensor_identity(name: str, tensor: Tensor) -> TensorIdentity:
    """Reads the whole tensor."""
    return TensorIdentity(name, tensor.dtype, tensor.data.shape, xxhash.xxh3_128_hexdigest(raw_bytes(tensor)))


def weights_digest(weights: Weights) -> str:
    """Identity of a whole set of weights: xxh3-128 over the tensors' identities by name, in hex."""
    return combined_digest(tensor_identity(name, tensor) for name, tensor in weights.items())


def combined_digest(identities: Iterable[TensorIdentity]) -> str:
    """`weights_digest` from identities that are known already."""
    whole = xxhash.xxh3_128()
    for name, dtype, shape, digest in sorted(identities):
        whole.update(f"{name}|{dtype}|{shape}|{digest}\n".encode())
    return whole.hexdigest()


class BadWeights(ValueError):
    """A weight file is damaged or holds what we do not use; the message names the file."""


class OtherFormat(BadWeights):
    """A number format that we do not use."""


class _Entry(Record):
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    data_offsets: tuple[int, int]
    """Bytes from the end of the header."""


_HEADER: Final[TypeAdapter[dict[str, _Entry]]] = TypeAdapter(dict[str, _Entry])
_TO_NAME: Final[Mapping[str, WeightDtype]] = {"F32": "float32", "BF16": "bfloat16"}
_TO_CODE: Final = {name: code for code, name in _TO_NAME.items()}
_MAX_HEADER_BYTES: Final = 100 * 2**20


def write_keyframe(path: Path, weights: Weights, *, version: int, digest: str | None = None) -> WeightObject:
    """Write the weights whole (safetensors), beside the old file and renamed, and describe the file.

    `digest` is their `weights_digest`, computed here if not known.
    """
    # float32 first: every tensor then starts at a multiple of its item size.
    names = sorted(weights, key=lambda name: (weights[name].dtype != "float32", name))
    entries: dict[str, dict[str, object]] = {}
    offset = 0
    for name in names:
        tensor = weights[name]
        stop = offset + tensor.data.nbytes
        entries[name] = {"dtype": _TO_CODE[tensor.dtype], "shape": tensor.data.shape, "data_offsets": (offset, stop)}
        offset = stop
    metadata = {"format": "pt", "version": str(version), "digest": digest or weights_digest(weights)}
    header = orjson.dumps({"__metadata__": metadata, **entries})
    header += b" " * (-len(header) % 8)
    body = (raw_bytes(weights[name]) for name in names)
    size, checksum = write_atomically(path, chain([len(header).to_bytes(8, "little"), header], body))
    return WeightObject(name=path.name, kind="keyframe", version=version, base=None, size_bytes=size, digest=checksum)


def read_keyframe(path: Path, *, writable: bool = False) -> Weights:
    """The tensors of a safetensors file, memory-mapped; `writable`: what is written goes to the file.

    Raises `BadWeights`.
    """
    size = path.stat().st_size
    if size < 8:
        raise BadWeights(f"weight file {path} has {size} bytes and is no safetensors file")
    mapped = np.memmap(path, dtype=np.uint8, mode="r+" if writable else "r")
    header_bytes = int.from_bytes(mapped[:8].tobytes(), "little")
    if header_bytes > min(size - 8, _MAX_HEADER_BYTES):
        raise BadWeights(f"weight file {path} claims a header of {header_bytes} bytes in a file of {size}: cut short?")
    body = mapped[8 + header_bytes :]
    try:
        header = orjson.loads(mapped[8 : 8 + header_bytes].tobytes())
        if isinstance(header, dict):
            header.pop("__metadata__", None)
        entries = _HEADER.validate_python(header)
    except (orjson.JSONDecodeError, ValidationError) as error:
        raise BadWeights(f"weight file {path} has a damaged header") from error
    return {name: _view(path, name, entry, body) for name, entry in entries.items()}


def _view(path: Path, name: str, entry: _Entry, body: NDArray[np.uint8]) -> Tensor:
    dtype = _TO_NAME.get(entry.dtype)
    if dtype is None:
        raise OtherFormat(f"weight file {path}: tensor {name!r} is {entry.dtype}; only F32 and BF16 are used here")
    item = np.dtype(np.float32 if dtype == "float32" else np.uint16)
    start, stop = entry.data_offsets
    if not 0 <= start <= stop <= len(body) or stop - start != item.itemsize * math.prod(entry.shape):
        raise BadWeights(
            f"weight file {path}: tensor {name!r} of shape {list(entry.shape)} claims bytes {start} to {stop}"
            f" of {len(body)}: cut short?"
        )
    try:
        data = np.asarray(body[start:stop]).view(item).reshape(entry.shape)
    except (ValueError, OverflowError) as error:  # more dimensions, or a longer one, than arrays have
        raise BadWeights(f"weight file {path}: tensor {name!r} has an impossible shape") from error
    # Files of other tools may mix item sizes without padding; not every consumer reads across alignment.
    return Tensor(dtype, data if data.flags.aligned else data.copy())


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes, not copied."""
    return tensor.data.reshape(-1).view(np.uint8).data


class Draft:
    """A file that appears under its name only when it is whole and on disk; before that it lies beside it."""

    def __init__(self, path: Path) -> None:
        self.size_bytes = 0
        self._path = path
        self._beside = path.with_name(f".{path.name}.{os.getpid()}")
        self._digest = xxhash.xxh3_128()

    def __enter__(self) -> Self:
        self._file = self._beside.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        with suppress(FileNotFoundError):
            self._beside.unlink()

    def write(self, part: bytes | memoryview) -> None:
        """Append."""
        self._digest.update(part)
        self.size_bytes += self._file.write(part)

    def commit(self) -> str:
        """Flush to disk and rename. Returns the xxh3-128 of the bytes in hex."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._beside.replace(self._path)
        return self._digest.hexdigest()


def write_atomically(path: Path, parts: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write the parts as a `Draft`. Returns (bytes, xxh3-128 in hex)."""
    with Draft(path) as draft:
        for part in parts:
            draft.write(part)
        return draft.size_bytes, draft.commit()


def file_digest(path: Path) -> str:
    """xxh3-128 of a file's bytes, as in `WeightObject.digest`."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while part := file.read(4 * 2**20):
            digest.update(part)
    return digest.hexdigest()


def covering(objects: Sequence[WeightObject], held: int | None) -> list[WeightObject]:
    """The chain with the fewest bytes from the weights `held` (None: nothing) to the newest, in the order to apply.

    Empty when `held` is the newest. Raises ValueError when no chain leads there.
    """
    newest = max((item.version for item in objects), default=held)
    best: dict[int | None, tuple[int, list[WeightObject]]] = {None: (0, []), held: (0, [])}
    # A delta's base is older than its version, so ascending versions visit every base before what is built on it.
    for item in sorted(objects, key=lambda item: item.version):
        if item.base in best and item.version != held:
            size, way = best[item.base]
            known = best.get(item.version)
            if known is None or size + item.size_bytes < known[0]:
                best[item.version] = (size + item.size_bytes, [*way, item])
    if newest not in best:
        raise ValueError(f"no chain of weight objects leads from version {held} to {newest}; a keyframe is missing")
    return best[newest][1]
