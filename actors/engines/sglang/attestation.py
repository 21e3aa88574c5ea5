"""The checksums that the ranks of a server must report once they hold a set of weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from actors.engines.sglang.model import EMBEDDING, HEAD
from protocols.weights import Tensor, WeightDtype, Weights

VOCABULARY_MULTIPLE: Final = 64
"""The server pads the vocabulary of embedding and head with zeros to a multiple of this."""
PROJECTION: Final = re.compile(
    r"(?P<layer>.*?\.)(?:experts\.(?P<expert>\d+)\.)?(?P<name>q|k|v|o|gate|up|down)_proj\.(?P<kind>weight|bias)"
)
Cut = Literal["rows", "columns", "vocabulary", "whole"]
"""How ranks share a tensor: by rows, by columns, by rows with padding, or each has it whole."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A published tensor's place in a tensor of the server."""

    target: str
    """The server's name of the tensor it is a part of."""
    order: tuple[int, int]
    """Among the parts."""
    cut: Cut


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


def expected_checksums(
    weights: Weights, *, dtype: WeightDtype, tied: bool, ranks: int = 1
) -> tuple[Mapping[str, str], ...]:
    """Per rank: server's tensor name → first 8 bytes of SHA-256 in hex, as a server on the CPU computes them.

    The server holds query, key and value projections as one tensor, gate and up projections as another, those of all
    experts as one, everything in its own number format and shared out over its ranks. Fits decoders that do just
    that (Llama, Qwen2, Qwen3, Qwen3-MoE and their relatives) where nothing is padded but the vocabulary: heads that
    `ranks` divides, intermediate sizes that are multiples of 32 · `ranks`.
    """
    parts: dict[str, list[tuple[_Piece, Tensor]]] = {}
    for name, tensor in weights.items():
        piece = _piece(name)
        parts.setdefault(piece.target, []).append((piece, tensor))
    sums: tuple[dict[str, str], ...] = tuple({} for _ in range(ranks))
    for target, members in parts.items():
        digests = [hashlib.sha256() for _ in range(ranks)]
        for piece, tensor in sorted(members, key=lambda member: member[0].order):
            own = converted(tensor, dtype)
            for rank, digest in enumerate(digests):
                digest.update(_share(own, piece.cut, rank=rank, ranks=ranks))
        for mapping, digest in zip(sums, digests, strict=True):
            mapping[target] = digest.hexdigest()[:16]
    if tied:
        for mapping in sums:
            mapping[HEAD] = mapping[EMBEDDING]
    return sums


def _share(tensor: Tensor, cut: Cut, *, rank: int, ranks: int) -> memoryview:
    """The bytes of what one rank holds of a tensor."""
    data: NDArray[np.generic] = tensor.data
    if cut == "vocabulary":
        data = np.pad(data, ((0, _padding_rows(len(data), ranks)), (0, 0)))
    if cut != "whole":
        size = data.shape[cut == "columns"] // ranks
        own = slice(rank * size, (rank + 1) * size)
        data = data[:, own] if cut == "columns" else data[own]
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8).data


def _padding_rows(rows: int, ranks: int) -> int:
    """Zeros behind the vocabulary."""
    padding = -rows % VOCABULARY_MULTIPLE
    return padding if (rows + padding) % ranks == 0 else -rows % (VOCABULARY_MULTIPLE * ranks)


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
