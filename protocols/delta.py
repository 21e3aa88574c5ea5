"""The lossless difference of two sets of weights: where bit patterns changed and by how many ulps, at RL's learning
rates a hundredth of the dense size or less. What does not fit the weights at hand is a `BadDelta`, never applied.

The file: magic; for every part (`protocols.parts.cut`) a zstd frame each of gap bytes, value bytes, uint16 and uint32
escapes (`protocols.ulp`), none for an empty stream; the header, zstd-compressed JSON; its size, a little-endian uint64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple, Self

import numpy as np
import zstandard
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from protocols import ulp
from protocols.messages import WeightObject
from protocols.parts import Part, cut, identities, in_order, slices
from protocols.records import Record
from protocols.ulp import Bits
from protocols.weights import Draft, Tensor, TensorIdentity, WeightDtype, Weights, combined_digest

Count = Annotated[int, Field(ge=0)]
Counts = tuple[Count, Count, Count, Count]
"""One for each stream: gaps, values, uint16 escapes, uint32 escapes."""

PART_ELEMENTS: Final = 2**22
"""Enough for a part's changes to be worth the tables of a zstd frame, few enough to share a small model out evenly."""
_MAGIC: Final = b"matpodl2"
_SIZE_BYTES: Final = 8
_MAX_HEADER_BYTES: Final = 64 * 2**20
_ZSTD: Final = zstandard.ZstdCompressionParameters(
    # Only entropy coding helps here: short matches in such streams are chance, and cost time and bytes.
    strategy=zstandard.STRATEGY_FAST,
    min_match=7,
    hash_log=6,
    window_log=17,
)


class BadDelta(ValueError):
    """A delta is damaged or was made for other weights; the message says which. Pull the keyframe instead."""


class _PartEntry(NamedTuple):
    lengths: Counts
    """Items of each stream."""
    packed: Counts
    """Bytes of each frame."""


class _Header(Record):
    base: int
    version: int
    base_digest: str
    digest: str
    tensors: tuple[TensorIdentity, ...]
    """After the delta, by name."""
    part_elements: Annotated[int, Field(gt=0)]
    parts: tuple[_PartEntry, ...]


class _Streams(NamedTuple):
    gaps: NDArray[np.uint8]
    values: NDArray[np.uint8]
    wide16: NDArray[np.uint16]
    wide32: NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class EncodedPart:
    """What a delta file holds of one part."""

    lengths: Counts
    """Items of each stream."""
    frames: Sequence[bytes | memoryview]
    """The streams, compressed."""


class Encoder:
    """Encodes parts, on any number of threads at once; each needs a scratch of 4 bytes an element, 8 for float32."""

    def __init__(self, weights: Weights, part_elements: int = PART_ELEMENTS) -> None:
        self._most = min(part_elements, sum(tensor.data.size for tensor in weights.values()))
        self._wide = any(tensor.dtype == "float32" for tensor in weights.values())
        self._free: list[_Streams] = []

    def encode(self, old: Sequence[Bits], new: Sequence[Bits]) -> EncodedPart:
        """What turns the arrays `old` into `new`: one part's slices, in order."""
        try:
            scratch = self._free.pop()
        except IndexError:
            scratch = self._scratch()
        at = ulp.start_encoding()
        for before, after in zip(old, new, strict=True):
            ulp.encode(_read_only(before), _read_only(after), *scratch, at)
        gaps, values, wide16, wide32 = (int(length) for length in at[: ulp.CARRIED])
        frames = (
            _pack(scratch.gaps[:gaps]),
            _pack(scratch.values[:values]),
            _pack(scratch.wide16[:wide16]),
            _pack(scratch.wide32[:wide32]),
        )
        self._free.append(scratch)
        return EncodedPart((gaps, values, wide16, wide32), frames)

    def _scratch(self) -> _Streams:
        # Every element changed; or fewer, and a gap byte more for every 255 unchanged ones.
        return _Streams(
            np.empty(self._most + self._most // ulp.SKIP, np.uint8),
            np.empty(self._most, np.uint8),
            np.empty(self._most, np.dtype("<u2")),
            np.empty(self._most if self._wide else 0, np.dtype("<u4")),
        )


def decode(encoded: EncodedPart, arrays: Sequence[Bits]) -> list[bool]:
    """Make a part's changes in its slices, in order; returns which have any.

    Raises `BadDelta` if the streams are no changes of such arrays. Nothing is allocated beyond the arrays' size.
    """
    elements = sum(map(len, arrays))
    gaps, values, wide16, wide32 = encoded.lengths
    if values > elements or gaps > values + elements // ulp.SKIP or wide16 + wide32 > values:
        raise BadDelta(f"claims more changes than the {elements} elements of a part can have")
    sizes = zip(encoded.frames, (gaps, values, 2 * wide16, 4 * wide32), strict=True)
    frames = [_unpack(frame, size) if len(frame) or size else b"" for frame, size in sizes]
    streams = _Streams(
        np.frombuffer(frames[0], np.uint8),
        np.frombuffer(frames[1], np.uint8),
        np.frombuffer(frames[2], "<u2"),
        np.frombuffer(frames[3], "<u4"),
    )
    at = ulp.start_decoding()
    made = [0]
    for array in arrays:
        if not ulp.decode(array, *streams, at):
            raise BadDelta("has a stream that ends too early")
        made.append(int(at[1]))
    if not np.array_equal(at[: ulp.CARRIED], encoded.lengths):
        raise BadDelta("has more changes of a part than fit there")
    return [before < after for before, after in pairwise(made)]


class DeltaWriter:
    """A delta file that grows part by part, and appears under its name when it is finished."""

    def __init__(self, path: Path, part_elements: int = PART_ELEMENTS) -> None:
        self._name = path.name
        self._draft = Draft(path)
        self._part_elements = part_elements
        self._entries: list[_PartEntry] = []

    def __enter__(self) -> Self:
        self._draft.__enter__()
        self._draft.write(_MAGIC)
        return self

    def __exit__(self, *error: object) -> None:
        self._draft.__exit__(*error)

    @property
    def size_bytes(self) -> int:
        """Written so far."""
        return self._draft.size_bytes

    def add(self, part: EncodedPart) -> None:
        """Append the next part, in the order of `protocols.parts.cut`."""
        for frame in part.frames:
            self._draft.write(frame)
        gaps, values, wide16, wide32 = map(len, part.frames)
        self._entries.append(_PartEntry(part.lengths, (gaps, values, wide16, wide32)))

    def finish(
        self,
        tensors: Iterable[TensorIdentity],
        *,
        kind: Literal["delta", "fold"],
        base_version: int,
        base_digest: str,
        version: int,
    ) -> WeightObject:
        """All parts are there: write to which tensors they lead, make the file durable and describe it.

        `base_digest` is the base's `weights_digest`.
        """
        after = tuple(sorted(tensors))
        header = _Header(
            base=base_version,
            version=version,
            base_digest=base_digest,
            digest=combined_digest(after),
            tensors=after,
            part_elements=self._part_elements,
            parts=tuple(self._entries),
        )
        text = zstandard.ZstdCompressor(level=9).compress(header.model_dump_json().encode())
        self._draft.write(text)
        self._draft.write(len(text).to_bytes(_SIZE_BYTES, "little"))
        digest = self._draft.commit()
        return WeightObject(
            name=self._name, kind=kind, version=version, base=base_version, size_bytes=self.size_bytes, digest=digest
        )


def write_delta(
    path: Path,
    base: Weights,
    target: Weights,
    *,
    base_version: int,
    version: int,
    kind: Literal["delta", "fold"] = "delta",
    base_digest: str | None = None,
    threads: int = 1,
    part_elements: int = PART_ELEMENTS,
) -> WeightObject:
    """Write what turns `base` into `target`, beside the old file and renamed, and describe the file.

    `base_digest` is the base's `weights_digest`, computed here if not known. Raises ValueError when the two do not have
    the same tensors.
    """
    if _shapes(base) != _shapes(target):
        odd = sorted(set(_shapes(base)) ^ set(_shapes(target)))[0][0]
        raise ValueError(f"weights {base_version} and {version} differ in the tensors they have, first {odd!r}")
    if base_digest is None:
        base_digest = combined_digest(identities(base, threads))
    encoder = Encoder(target, part_elements)

    def encode(part: Part) -> EncodedPart:
        return encoder.encode(slices(base, part), slices(target, part))

    with DeltaWriter(path, part_elements) as writer:
        for encoded in in_order(encode, cut(target, part_elements), threads):
            writer.add(encoded)
        after = identities(target, threads)
        return writer.finish(after, kind=kind, base_version=base_version, base_digest=base_digest, version=version)


def apply_delta(path: Path, base: Weights, *, base_version: int, threads: int = 1) -> Weights:
    """The weights after the delta, in memory of their own; `base` is left as it is. Raises as `patch_weights`."""
    copies = in_order(lambda tensor: Tensor(tensor.dtype, tensor.data.copy()), base.values(), threads)
    copy = dict(zip(base, copies, strict=True))
    patch_weights(path, copy, base_version=base_version, threads=threads)
    return copy


def patch_weights(
    path: Path, weights: Weights, *, base_version: int, base_digest: str | None = None, threads: int = 1
) -> str:
    """Turn `weights`, whose arrays must be writable, into the delta's version where they lie; returns their digest.

    `base_digest` is their `weights_digest` before, computed here if not known; every tensor is checked after the change
    in either case. Raises `BadDelta` if the file is damaged, was made for another version or other weights, or gives
    others than meant. The weights may then be half changed: throw them away.
    """
    fixed = [name for name, tensor in weights.items() if not tensor.data.flags.writeable]
    if fixed:
        raise ValueError(f"{len(fixed)} tensors are read-only, first {fixed[0]!r}: patch a copy")
    try:
        return _patch(path, weights, base_version, base_digest, threads)
    except BadDelta as error:
        raise BadDelta(f"delta {path} {error}; pull the keyframe instead") from error


def _patch(path: Path, weights: Weights, base_version: int, base_digest: str | None, threads: int) -> str:
    if path.stat().st_size < len(_MAGIC) + _SIZE_BYTES:
        raise BadDelta("is no delta file, or was cut short")
    raw = np.memmap(path, dtype=np.uint8, mode="r").data
    header = _read_header(raw)
    if header.base != base_version:
        raise BadDelta(f"turns version {header.base} into {header.version}, but version {base_version} is held")
    held: dict[str, TensorIdentity] = {}
    if base_digest is None:
        held = {known.name: known for known in identities(weights, threads)}
        base_digest = combined_digest(held.values())
    if base_digest != header.base_digest:
        raise BadDelta(f"was made for other weights of version {base_version}")
    if {(t.name, t.dtype, t.shape) for t in header.tensors} != _shapes(weights):
        raise BadDelta("names other tensors than the weights it was made for")
    elements = sum(tensor.data.size for tensor in weights.values())
    if len(header.parts) != -(-elements // header.part_elements):
        raise BadDelta(f"has {len(header.parts)} parts, its header says otherwise")

    def patch(work: tuple[Part, EncodedPart]) -> set[str]:
        part, encoded = work
        changed = decode(encoded, slices(weights, part))
        return {piece.name for piece, moved in zip(part, changed, strict=True) if moved}

    parts = zip(cut(weights, header.part_elements), _parts(header, raw), strict=True)
    changed = set[str]().union(*in_order(patch, parts, threads))
    unsure = {name: weights[name] for name in weights if name in changed or name not in held}
    held |= {known.name: known for known in identities(unsure, threads)}
    for entry in header.tensors:
        if held[entry.name] != entry:
            raise BadDelta(f"gives another tensor {entry.name!r} than the learner's")
    digest = combined_digest(held.values())
    if digest != header.digest:
        raise BadDelta(f"gives other weights than the learner's version {header.version}")
    return digest


def _read_header(raw: memoryview) -> _Header:
    end = len(raw) - _SIZE_BYTES
    size = int.from_bytes(raw[end:], "little")
    if bytes(raw[: len(_MAGIC)]) != _MAGIC or size > end - len(_MAGIC):
        raise BadDelta("is no delta file, or was cut short")
    try:
        header = _Header.model_validate_json(_unpack(raw[end - size : end], _MAX_HEADER_BYTES, exactly=False))
    except ValidationError as error:
        raise BadDelta("has a damaged header") from error
    if len(_MAGIC) + sum(sum(entry.packed) for entry in header.parts) != end - size:
        raise BadDelta(f"has {len(raw)} bytes, its header says otherwise: cut short?")
    return header


def _parts(header: _Header, raw: memoryview) -> Iterator[EncodedPart]:
    at = len(_MAGIC)
    for entry in header.parts:
        ends = list(accumulate(entry.packed, initial=at))
        yield EncodedPart(entry.lengths, [raw[start:stop] for start, stop in pairwise(ends)])
        at = ends[-1]


def _shapes(weights: Weights) -> set[tuple[str, WeightDtype, tuple[int, ...]]]:
    return {(name, tensor.dtype, tensor.data.shape) for name, tensor in weights.items()}


def _read_only(array: Bits) -> Bits:
    """A view that cannot be written: the loops are compiled for those alone, wherever arrays come from."""
    view = array.view()
    view.flags.writeable = False
    return view


def _pack(stream: NDArray[np.generic]) -> bytes:
    return zstandard.ZstdCompressor(compression_params=_ZSTD).compress(stream.data) if len(stream) else b""


def _unpack(frame: bytes | memoryview, length: int, *, exactly: bool = True) -> bytes:
    """Decompress a frame of so many bytes, or of at most so many."""
    try:
        found = zstandard.get_frame_parameters(frame).content_size
        if found > length or (exactly and found != length):
            raise BadDelta("has a stream of another length than its header says")
        return zstandard.ZstdDecompressor().decompress(frame, max_output_size=length, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise BadDelta("has a damaged stream") from error
