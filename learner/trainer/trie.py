"""Merge token sequences into a trie, so that every distinct prefix is computed once.

Tokens lie flat in depth-first order; a token's position is its depth; a token's descendants stand right after it, up to
its `subtree_end`. Token q follows on token k, and may see it, where `k <= q < subtree_end[k]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indexes = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Trie:
    """N distinct prefixes of S sequences."""

    tokens: Indexes
    """Token ids, shape N, depth first."""
    positions: Indexes
    """Depth of each token, shape N."""
    subtree_end: Indexes
    """One past the last descendant of each token, shape N."""
    paths: tuple[Indexes, ...]
    """Per sequence, in the order given: the place in `tokens` of each of its tokens."""
    leaves: tuple[int, ...]
    """Sequences that together hold every token: those that are no prefix of another one."""


def lexicographic(sequences: Sequence[NDArray[np.int32]]) -> tuple[list[int], list[int]]:
    """Order of the sequences that puts shared prefixes side by side, and each one's common prefix with the one before.

    Equal sequences keep their order, so the result is a function of the input alone.
    """
    keys = [sequence.astype(">u4").tobytes() for sequence in sequences]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    shared = [0] * len(order)
    for place in range(1, len(order)):
        shared[place] = common_prefix(sequences[order[place - 1]], sequences[order[place]])
    return order, shared


def common_prefix(one: NDArray[np.int32], other: NDArray[np.int32]) -> int:
    """Length of the longest common prefix of two sequences."""
    short = min(len(one), len(other))
    differing = np.flatnonzero(one[:short] != other[:short])
    return int(differing[0]) if len(differing) else short


def build_trie(sequences: Sequence[NDArray[np.int32]]) -> Trie:
    """The trie of some sequences, each at least one token long."""
    order, shared = lexicographic(sequences)
    paths: list[Indexes] = [np.empty(0, np.int64)] * len(sequences)
    tokens: list[NDArray[np.int32]] = []
    positions: list[Indexes] = []
    subtree_end = np.empty(sum(len(sequence) for sequence in sequences), np.int64)
    leaves: list[int] = []
    total = 0
    previous = np.empty(0, np.int64)
    for place, index in enumerate(order):
        own = sequences[index][shared[place] :]
        subtree_end[previous[shared[place] :]] = total
        previous = np.concatenate([previous[: shared[place]], np.arange(total, total + len(own), dtype=np.int64)])
        paths[index] = previous
        total += len(own)
        tokens.append(own)
        positions.append(np.arange(shared[place], shared[place] + len(own), dtype=np.int64))
        # Sorted, a prefix comes right before what extends it.
        if place + 1 == len(order) or shared[place + 1] < len(sequences[index]):
            leaves.append(index)
    subtree_end[previous] = total
    return Trie(
        tokens=np.concatenate(tokens).astype(np.int64),
        positions=np.concatenate(positions),
        subtree_end=subtree_end[:total].copy(),
        paths=tuple(paths),
        leaves=tuple(leaves),
    )
