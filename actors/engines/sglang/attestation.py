"""The checksums that the ranks of a server must report once they hold a set of weights."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from actors.engines.sglang.checksums import checksum
from actors.engines.sglang.model import EMBEDDING, HEAD, ModelFacts
from matpo.config import SglangEngine as Settings
from protocols.ulp import Bytes
from protocols.weights import Tensor, WeightDtype, Weights

VOCABULARY_MULTIPLE: Final = 64
"""The server pads the vocabulary of embedding and head with zeros to a multiple of this."""
CPU_MULTIPLE: Final = 32
"""A server on the CPU pads what its ranks hold of a layer to a multiple of this."""
PROJECTION: Final = re.compile(
    r"(?P<layer>.*?\.)(?:experts\.(?P<expert>\d+)\.)?(?P<name>q|k|v|o|gate|up|down)_proj\.(?P<kind>weight|bias)"
)
Cut = Literal["rows", "columns", "vocabulary", "whole"]
"""How ranks share a tensor: by rows, by columns, by rows with padding, or each has it whole."""
Checksums = Mapping[str, str]
"""Server's tensor name → 16 hex digits."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a server keeps the weights it is given."""

    dtype: WeightDtype
    device: Literal["cuda", "cpu"]
    tied: bool
    """Whether head and embedding are one tensor."""
    ranks: int = 1
    key_heads: int = 1
    """Heads of keys and values."""

    @classmethod
    def of(cls, facts: ModelFacts, settings: Settings) -> Layout:
        """In the servers that the settings describe."""
        return cls(settings.dtype, settings.device, facts.tied, settings.tensor_parallel, facts.key_heads)

    @property
    def exact(self) -> bool:
        """Whether all of its tensors are known; otherwise those that are known are compared."""
        return self.device == "cpu" and self.ranks == 1


@dataclass(frozen=True, slots=True)
class _Piece:
    """A published tensor's place in a tensor of the server."""

    target: str
    """The server's name of the tensor it is a part of."""
    order: tuple[int, int]
    """Among the parts."""
    cut: Cut


def expected_checksums(weights: Weights, layout: Layout) -> tuple[Checksums, ...]:
    """Per rank. A tensor that the ranks would not share evenly is left out: how it is padded is not known.

    The server holds query, key and value projections as one tensor, gate and up projections as another, those of all
    experts as one, everything in its own number format. Fits decoders that do just that: Llama, Qwen2, Qwen3,
    Qwen3-MoE and their relatives.
    """
    parts: dict[str, list[tuple[_Piece, Tensor]]] = {}
    for name, tensor in weights.items():
        piece = _piece(name)
        parts.setdefault(piece.target, []).append((piece, tensor))
    known = {
        target: sorted(members, key=lambda member: member[0].order)
        for target, members in parts.items()
        if all(_shared_evenly(piece, tensor, layout) for piece, tensor in members)
    }

    def sums(target: str) -> tuple[str, ...]:
        whole = [(piece.cut, converted(tensor, layout.dtype).data) for piece, tensor in known[target]]
        return tuple(
            checksum([_share(data, cut, rank=rank, ranks=layout.ranks) for cut, data in whole], layout.device)
            for rank in range(layout.ranks)
        )

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
        found = dict(zip(known, threads.map(sums, known), strict=True))
    if layout.tied and EMBEDDING in found:
        found[HEAD] = found[EMBEDDING]
    return tuple({target: by_rank[rank] for target, by_rank in found.items()} for rank in range(layout.ranks))


def first_difference(expected: Checksums, reported: Checksums, layout: Layout) -> str | None:
    """The name of a tensor the server holds otherwise; None when all agree.

    Where the layout is known exactly, also of one that it lacks, or holds without our knowing. Raises `ValueError`
    where nothing can be compared.
    """
    names = set(expected) | set(reported) if layout.exact else set(expected) & set(reported)
    if not names:
        raise ValueError("it names its tensors in a way that is not known here; set actor.engine.attest = false")
    for name in sorted(names):
        if name == HEAD and layout.tied and name not in reported:
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


def _piece(name: str) -> _Piece:
    if name in (EMBEDDING, HEAD):
        return _Piece(name, (0, 0), "vocabulary")
    found = PROJECTION.fullmatch(name)
    if found is None:
        return _Piece(name, (0, 0), "whole")
    layer, projection, kind = found["layer"], found["name"], found["kind"]
    if found["expert"] is not None:
        expert = int(found["expert"])
        if projection == "down":
            return _Piece(f"{layer}experts.w2_weight", (expert, 0), "columns")
        return _Piece(f"{layer}experts.w13_weight", (expert, int(projection == "up")), "rows")
    if projection in "qkv":
        return _Piece(f"{layer}qkv_proj.{kind}", (0, "qkv".index(projection)), "rows")
    if projection in ("gate", "up"):
        return _Piece(f"{layer}gate_up_proj.{kind}", (0, int(projection == "up")), "rows")
    return _Piece(name, (0, 0), "columns" if kind == "weight" else "whole")


def _shared_evenly(piece: _Piece, tensor: Tensor, layout: Layout) -> bool:
    if layout.ranks == 1 or piece.cut in ("whole", "vocabulary"):
        return True
    if piece.target.rpartition(".")[0].endswith("qkv_proj") and layout.key_heads % layout.ranks:
        return False
    size: int = tensor.data.shape[1 if piece.cut == "columns" else 0]
    return size % (layout.ranks * (CPU_MULTIPLE if layout.device == "cpu" else 1)) == 0


def _share(data: NDArray[np.generic], cut: Cut, *, rank: int, ranks: int) -> Bytes:
    """The bytes of what one rank holds of a tensor."""
    if cut == "vocabulary" and (padding := _padding_rows(len(data), ranks)):
        data = np.pad(data, ((0, padding), (0, 0)))
    if cut != "whole" and ranks > 1:
        size = data.shape[1 if cut == "columns" else 0] // ranks
        own = slice(rank * size, (rank + 1) * size)
        data = data[:, own] if cut == "columns" else data[own]
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8)


def _padding_rows(rows: int, ranks: int) -> int:
    """Zeros behind the vocabulary."""
    padding = -rows % VOCABULARY_MULTIPLE
    return padding if (rows + padding) % ranks == 0 else -rows % (VOCABULARY_MULTIPLE * ranks)
