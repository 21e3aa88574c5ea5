"""The checksum that a server reports of a tensor: on the CPU and on CUDA they are of different makes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from protocols.ulp import Bytes, compiled

TILE_WORDS: Final = 8192
_FIRST_SEED, _SECOND_SEED = np.uint32(0x243F6A88), np.uint32((0x243F6A88 * 0x9E3779B1 ^ 0xDEADBEEF) & 0xFFFFFFFF)
_FIRST_PLACE, _SECOND_PLACE = np.uint32(0x27D4EB2D), np.uint32(0x165667B1)
_MASK64: Final = (1 << 64) - 1


def checksum(parts: Sequence[Bytes], device: Literal["cuda", "cpu"]) -> str:
    """16 hex digits for a tensor whose bytes are those of the parts, one after the other."""
    return cuda_checksum(parts) if device == "cuda" else cpu_checksum(parts)


def cpu_checksum(parts: Sequence[Bytes]) -> str:
    """First 8 bytes of SHA-256."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.data)
    return digest.hexdigest()[:16]


def cuda_checksum(parts: Sequence[Bytes]) -> str:
    """SGLang's `gpu_tensor_hash`: two sums of mixed 32-bit words for each tile, finished, added up and mixed again."""
    if any(len(part) % 4 for part in parts):
        joined = np.concatenate(parts)
        parts = [np.pad(joined, (0, -len(joined) % 4))]
    words = sum(len(part) for part in parts) // 4
    if not words:
        return f"{0:016x}"
    sums = np.zeros((-(-words // TILE_WORDS), 2), dtype=np.uint32)
    first = 0
    for part in parts:
        _add_words(part.view(np.uint32), first, sums)
        first += len(part) // 4
    finished = _mixed(sums ^ np.uint32(words * 4 & 0xFFFFFFFF)).astype(np.uint64)
    total = int(((finished[:, 0] << np.uint64(32)) | finished[:, 1]).sum(dtype=np.uint64))
    total = (total ^ total >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
    total = (total ^ total >> 27) * 0x94D049BB133111EB & _MASK64
    return f"{total ^ total >> 31:016x}"


def _mixed(words: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The finalizer of MurmurHash3."""
    words = (words ^ words >> np.uint32(16)) * np.uint32(0x85EBCA6B)
    words = (words ^ words >> np.uint32(13)) * np.uint32(0xC2B2AE35)
    return words ^ words >> np.uint32(16)


@compiled
def _add_words(words: NDArray[np.uint32], first: int, sums: NDArray[np.uint32]) -> None:
    """Add words, of which the first stands at `first` in its tensor, to the sums of their tiles."""
    start = 0
    while start < len(words):
        tile = (first + start) // TILE_WORDS
        end = min(len(words), (tile + 1) * TILE_WORDS - first)
        sum1, sum2 = np.uint32(0), np.uint32(0)
        for at in range(start, end):
            place = np.uint32(first + at)
            mixed1 = np.uint32(place * _FIRST_PLACE + _FIRST_SEED) ^ np.uint32(place << 15 | place >> np.uint32(17))
            mixed2 = np.uint32(place * _SECOND_PLACE + _SECOND_SEED) ^ np.uint32(place << 13 | place >> np.uint32(19))
            mixed1, mixed2 = words[at] ^ mixed1, words[at] ^ mixed2
            mixed1 = np.uint32((mixed1 ^ mixed1 >> np.uint32(16)) * np.uint32(0x85EBCA6B))
            mixed2 = np.uint32((mixed2 ^ mixed2 >> np.uint32(16)) * np.uint32(0x85EBCA6B))
            mixed1 = np.uint32((mixed1 ^ mixed1 >> np.uint32(13)) * np.uint32(0xC2B2AE35))
            mixed2 = np.uint32((mixed2 ^ mixed2 >> np.uint32(13)) * np.uint32(0xC2B2AE35))
            sum1 = np.uint32(sum1 + (mixed1 ^ mixed1 >> np.uint32(16)))
            sum2 = np.uint32(sum2 + (mixed2 ^ mixed2 >> np.uint32(16)))
        sums[tile, 0] += sum1
        sums[tile, 1] += sum2
        start = end
