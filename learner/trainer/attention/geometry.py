"""Runs and chains of a trie: the two ways its attention is cut into plain pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from learner.trainer.trie import Indexes, Trie


def runs(trie: Trie) -> list[slice]:
    """Maximal ranges of tokens each of which follows on the one before it."""
    starts = np.flatnonzero(np.diff(trie.positions, prepend=-2) != 1).tolist()
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(trie.tokens)], strict=True)]


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """Consecutive tokens of a run, and the tokens up to the last of them that any of them may see."""

    queries: slice
    keys: Indexes
    """Trie places along the path; the queries themselves are the last of them."""


def chains(trie: Trie, window: int | None, longest: int | None = None) -> Iterator[Chain]:
    """Cut every run into chains of at most `longest` queries. With a window a token sees the last `window` up to
    itself."""
    owner = np.empty(len(trie.tokens), np.int64)
    for leaf in trie.leaves:
        owner[trie.paths[leaf]] = leaf
    for run in runs(trie):
        path = trie.paths[owner[run.stop - 1]]
        step = longest or run.stop - run.start
        for start in range(run.start, run.stop, step):
            end, depth = min(start + step, run.stop), int(trie.positions[start])
            first = 0 if window is None else max(0, depth - window + 1)
            yield Chain(slice(start, end), path[first : depth + end - start])
