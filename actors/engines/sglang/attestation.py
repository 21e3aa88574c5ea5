"""The checksums that a server must report once it holds a set of weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np

from actors.engines.sglang.model import EMBEDDING, HEAD
from protocols.weights import Tensor, WeightDtype, Weights, raw_bytes

VOCABULARY_MULTIPLE: Final = 64
"""The server pads the vocabulary of embedding and head with zeros to a multiple of this."""
FUSED: Final = re.compile(r"(.*\.)(?:([qkv])_proj|(gate|up)_proj)\.(weight|bias)")


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
