"""A file of weights cut into ranges of bytes that a server can receive one by one as `flattened_bucket`s."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import orjson
from pydantic import BaseModel, ConfigDict, TypeAdapter

BUCKET_BYTES: Final = 512 * 2**20
"""A server holds one bucket beside its weights while it copies the tensors out of it."""
_NAMES: Final[Mapping[str, str]] = {"F32": "float32", "BF16": "bfloat16"}
_ITEM_BYTES: Final[Mapping[str, int]] = {"F32": 4, "BF16": 2}


class _Place(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


_HEADER: Final[TypeAdapter[dict[str, _Place]]] = TypeAdapter(dict[str, _Place])


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors that lie one behind the other in a file."""

    start: int
    """First byte in the file."""
    size: int
    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


def cut(file: Path, names: Collection[str], *, limit: int = BUCKET_BYTES) -> tuple[Bucket, ...]:
    """The named tensors of a safetensors file in as few buckets as `limit` bytes allow; a larger tensor has its own.

    A bucket ends where the file has a gap, and where a tensor would not lie at a multiple of its item size.
    """
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = orjson.loads(opened.read(size))
    header.pop("__metadata__", None)
    places = _HEADER.validate_python({name: header[name] for name in names})
    groups: list[list[tuple[str, _Place]]] = []
    for name, place in sorted(places.items(), key=lambda item: item[1].data_offsets):
        first, stop = place.data_offsets
        if groups:
            start, end = groups[-1][0][1].data_offsets[0], groups[-1][-1][1].data_offsets[1]
            aligned = (first - start) % _ITEM_BYTES[place.dtype] == 0
            if first == end and aligned and stop - start <= limit:
                groups[-1].append((name, place))
                continue
        groups.append([(name, place)])
    return tuple(_bucket(group, offset=8 + size) for group in groups)


def _bucket(group: list[tuple[str, _Place]], *, offset: int) -> Bucket:
    first, last = group[0][1].data_offsets[0], group[-1][1].data_offsets[1]
    return Bucket(
        start=offset + first,
        size=last - first,
        names=tuple(name for name, _ in group),
        dtypes=tuple(_NAMES[place.dtype] for _, place in group),
        shapes=tuple(place.shape for _, place in group),
    )
