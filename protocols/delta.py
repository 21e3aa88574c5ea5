"""The lossless difference of two sets of weights: where bit patterns changed and by how many ulps, at RL's learning
rates a hundredth of the dense size or less. What does not fit the weights at hand is a `BadDelta`, never applied."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import numpy as np
import zstandard
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from protocols.messages import WeightObject
from protocols.records import Record
from protocols.weights import (
    Tensor,
    WeightDtype,
    Weights,
    combined_digest,
    tensor_digest,
    weights_digest,
    write_atomically,
)

Bytes = NDArray[np.uint8]
Bits = NDArray[np.uint16] | NDArray[np.uint32]
Count = Annotated[int, Field(ge=0)]

_MAGIC: Final = b"matpodl1"
_MAX_HEADER_BYTES: Final = 64 * 2**20
_SKIP: Final = 255
"""A gap byte: 255 unchanged values, and more to come."""
_WIDE16, _WIDE32 = 254, 255
"""A value byte: the zigzag ulp difference is in the uint16, or the uint32, stream."""


class BadDelta(ValueError):
    """A delta is damaged or was made for other weights; the message says which. Pull the keyframe instead."""


class _TensorDelta(Record):
    """What the streams hold of one tensor, in the header's order."""

    name: str
    dtype: WeightDtype
    shape: tuple[Count, ...]
    digest: str
    """Of the tensor after the delta."""
    gaps: Count
    """Bytes of the gap stream."""
    changed: Count
    """Bytes of the value stream: one per changed element."""
    wide16: Count
    wide32: Count


class _Header(Record):
    base: int
    version: int
    base_digest: str
    digest: str
    tensors: tuple[_TensorDelta, ...]
    stream_bytes: tuple[Count, Count, Count, Count]
    """Compressed sizes: gaps, values, uint16 escapes, uint32 escapes."""


@dataclass(frozen=True, slots=True)
class _Streams:
    gaps: Bytes
    values: Bytes
    wide16: NDArray[np.uint16]
    wide32: NDArray[np.uint32]


def write_delta(
    path: Path,
    base: Weights,
    target: Weights,
    *,
    base_version: int,
    version: int,
    kind: Literal["delta", "fold"] = "delta",
) -> WeightObject:
    """Write what turns `base` into `target`, beside the old file and renamed, and describe the file.

    Raises ValueError when the two do not have the same tensors.
    """
    if _shapes(base) != _shapes(target):
        odd = sorted(set(_shapes(base)) ^ set(_shapes(target)))[0][0]
        raise ValueError(f"weights {base_version} and {version} differ in the tensors they have, first {odd!r}")
    names = sorted(target)
    streams = [_encode(base[name], target[name]) for name in names]
    digests = {name: tensor_digest(target[name]) for name in names}
    packed = [
        _compress([s.gaps for s in streams]),
        _compress([s.values for s in streams]),
        _compress([s.wide16.astype("<u2") for s in streams]),
        _compress([s.wide32.astype("<u4") for s in streams]),
    ]
    header = _Header(
        base=base_version,
        version=version,
        base_digest=weights_digest(base),
        digest=combined_digest(target, digests),
        tensors=tuple(
            _TensorDelta(
                name=name,
                dtype=target[name].dtype,
                shape=target[name].data.shape,
                digest=digests[name],
                gaps=len(s.gaps),
                changed=len(s.values),
                wide16=len(s.wide16),
                wide32=len(s.wide32),
            )
            for name, s in zip(names, streams, strict=True)
        ),
        stream_bytes=(len(packed[0]), len(packed[1]), len(packed[2]), len(packed[3])),
    )
    text = header.model_dump_json().encode()
    size, digest = write_atomically(path, [_MAGIC, len(text).to_bytes(8, "little"), text, *packed])
    return WeightObject(name=path.name, kind=kind, version=version, base=base_version, size_bytes=size, digest=digest)


def apply_delta(path: Path, base: Weights, *, base_version: int, threads: int = 1) -> Weights:
    """The weights after the delta, in memory of their own; `base` is left as it is. Raises as `patch_weights`."""
    copy = {name: Tensor(tensor.dtype, tensor.data.copy()) for name, tensor in base.items()}
    patch_weights(path, copy, base_version=base_version, threads=threads)
    return copy


def patch_weights(path: Path, weights: Weights, *, base_version: int, threads: int = 1) -> None:
    """Turn `weights`, whose arrays must be writable, into the delta's version where they lie.

    Raises `BadDelta` if the file is damaged, was made for another version or other weights, or gives others than meant.
    The weights may then be half changed: throw them away.
    """
    try:
        _patch(path.read_bytes(), weights, base_version)
    except BadDelta as error:
        raise BadDelta(f"delta {path} {error}; pull the keyframe instead") from error


def _patch(raw: bytes, base: Weights, base_version: int) -> None:
    header, at = _read_header(raw)
    if header.base != base_version:
        raise BadDelta(f"turns version {header.base} into {header.version}, but version {base_version} is held")
    known = {name: tensor_digest(tensor) for name, tensor in base.items()}
    if combined_digest(base, known) != header.base_digest:
        raise BadDelta(f"was made for other weights of version {base_version}")
    if {(t.name, t.dtype, t.shape) for t in header.tensors} != _shapes(base):
        raise BadDelta("names other tensors than the weights it was made for")
    for entry, part in zip(header.tensors, _streams(header, memoryview(raw)[at:]), strict=True):
        if entry.changed:
            _decode(entry, part, base[entry.name])
            known[entry.name] = tensor_digest(base[entry.name])
        if known[entry.name] != entry.digest:
            raise BadDelta(f"gives another tensor {entry.name!r} than the learner's")
    if combined_digest(base, known) != header.digest:
        raise BadDelta(f"gives other weights than the learner's version {header.version}")


def _shapes(weights: Weights) -> set[tuple[str, WeightDtype, tuple[int, ...]]]:
    return {(name, tensor.dtype, tensor.data.shape) for name, tensor in weights.items()}


def _encode(base: Tensor, target: Tensor) -> _Streams:
    changed, old, new = _changes(_bits(base), _bits(target))
    width = 8 * old.itemsize
    distance = np.diff(changed, prepend=-1) - 1
    skips = distance // _SKIP
    ends = np.cumsum(skips + 1) - 1
    gaps = np.full(int(ends[-1]) + 1 if len(ends) else 0, _SKIP, dtype=np.uint8)
    gaps[ends] = distance - _SKIP * skips
    code = _zigzag(_ordered(new, width) - _ordered(old, width), width) - 1
    values = np.minimum(code, _WIDE16).astype(np.uint8)
    values[code > 0xFFFF] = _WIDE32
    return _Streams(gaps, values, code[values == _WIDE16].astype(np.uint16), code[values == _WIDE32].astype(np.uint32))


def _decode(entry: _TensorDelta, part: _Streams, base: Tensor) -> None:
    old = _bits(base)
    width = 8 * old.itemsize
    more = part.gaps == _SKIP
    positions = (np.cumsum(part.gaps + (~more).astype(np.int64)) - 1)[~more]
    narrow, wide = part.values == _WIDE16, part.values == _WIDE32
    sizes = (len(positions), int(narrow.sum()), int(wide.sum()))
    if sizes != (entry.changed, entry.wide16, entry.wide32) or int(positions[-1]) >= len(old):
        raise BadDelta(f"is damaged in tensor {entry.name!r}")
    code = part.values.astype(np.int64)
    code[narrow] = part.wide16
    code[wide] = part.wide32
    new = _ordered(old[positions], width) + _unzigzag(code + 1)
    old[positions] = _unordered(new & ((1 << width) - 1), width)


def _bits(tensor: Tensor) -> Bits:
    flat = tensor.data.reshape(-1)
    return flat.view(np.uint16) if tensor.dtype == "bfloat16" else flat.view(np.uint32)


def _changes(old: Bits, new: Bits) -> tuple[NDArray[np.int64], Bits, Bits]:
    """Ascending positions where the two differ, and the values there before and after.

    Compared eight bytes at a time, because nearly none differ.
    """
    lanes = 8 // old.itemsize
    whole = len(old) // lanes * lanes
    old_words, new_words = old[:whole].view(np.uint64), new[:whole].view(np.uint64)
    words = np.flatnonzero(old_words != new_words)
    before = np.concatenate([old_words[words].view(old.dtype), old[whole:]])
    after = np.concatenate([new_words[words].view(new.dtype), new[whole:]])
    first = np.append(words * lanes, whole)
    found = np.flatnonzero(before != after)
    positions: NDArray[np.int64] = first[found // lanes] + (found & (lanes - 1))
    return positions, before[found], after[found]


def _ordered(bits: Bits, width: int) -> NDArray[np.int64]:
    """Bit patterns of floats as integers in the floats' order, neighbours one apart; one to one, so -0 is not 0."""
    wide, sign = bits.astype(np.int64), 1 << (width - 1)
    return np.where(wide & sign, 2 * sign - 1 - wide, wide | sign)


def _unordered(keys: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    sign = 1 << (width - 1)
    return np.where(keys & sign, keys ^ sign, 2 * sign - 1 - keys)


def _zigzag(difference: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """0, -1, 1, -2, … as 0, 1, 2, 3, …, of differences modulo 2^width, so that the code has `width` bits too."""
    half = 1 << (width - 1)
    centred = ((difference + half) & (2 * half - 1)) - half
    return (centred << 1) ^ (centred >> 63)


def _unzigzag(code: NDArray[np.int64]) -> NDArray[np.int64]:
    return (code >> 1) ^ -(code & 1)


def _compress(parts: Sequence[NDArray[np.generic]]) -> bytes:
    joined = np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint8)
    return zstandard.ZstdCompressor(level=1).compress(joined.tobytes())


def _read_header(raw: bytes) -> tuple[_Header, int]:
    """The checked header and where the streams begin."""
    start = len(_MAGIC) + 8
    size = int.from_bytes(raw[len(_MAGIC) : start], "little")
    if raw[: len(_MAGIC)] != _MAGIC or size > min(len(raw) - start, _MAX_HEADER_BYTES):
        raise BadDelta("is no delta file, or was cut short")
    try:
        header = _Header.model_validate_json(raw[start : start + size])
    except ValidationError as error:
        raise BadDelta("has a damaged header") from error
    if start + size + sum(header.stream_bytes) != len(raw):
        raise BadDelta(f"has {len(raw)} bytes, its header says otherwise: cut short?")
    for entry in header.tensors:
        elements = math.prod(entry.shape)
        skips = elements // _SKIP
        if (
            entry.changed > elements
            or entry.gaps > entry.changed + skips
            or entry.wide16 + entry.wide32 > entry.changed
        ):
            raise BadDelta(f"claims more changes of tensor {entry.name!r} than it has elements")
    return header, start + size


def _streams(header: _Header, body: memoryview) -> Iterator[_Streams]:
    """Each tensor's part of the streams. Sizes were checked against the weights: nothing beyond them is allocated."""
    tensors = header.tensors
    lengths = [sum(t.gaps for t in tensors), sum(t.changed for t in tensors)]
    lengths += [2 * sum(t.wide16 for t in tensors), 4 * sum(t.wide32 for t in tensors)]
    unpacked: list[bytes] = []
    for packed, length in zip(header.stream_bytes, lengths, strict=True):
        unpacked.append(_decompress(body[:packed], length))
        body = body[packed:]
    gaps, values = np.frombuffer(unpacked[0], np.uint8), np.frombuffer(unpacked[1], np.uint8)
    wide16, wide32 = np.frombuffer(unpacked[2], "<u2"), np.frombuffer(unpacked[3], "<u4")
    for entry in tensors:
        yield _Streams(gaps[: entry.gaps], values[: entry.changed], wide16[: entry.wide16], wide32[: entry.wide32])
        gaps, values = gaps[entry.gaps :], values[entry.changed :]
        wide16, wide32 = wide16[entry.wide16 :], wide32[entry.wide32 :]


def _decompress(packed: memoryview, length: int) -> bytes:
    try:
        if zstandard.get_frame_parameters(packed).content_size != length:
            raise BadDelta("has a stream of another length than its header says")
        return zstandard.ZstdDecompressor().decompress(packed, max_output_size=length)
    except zstandard.ZstdError as error:
        raise BadDelta("has a damaged stream") from error
