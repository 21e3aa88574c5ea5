"""Attention over a trie with FlexAttention: one mask predicate, and only the blocks in which it holds for some pair."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from learner.trainer.trie import Indexes, Trie

BLOCK: Final = 128
"""Tokens of a block of the mask, queries and keys alike."""


def visible(
    subtree_end: Tensor, depth: Tensor, window: int | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's predicate of a trie: does token q see token k?"""

    def mask(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        follows = (k <= q) & (q < subtree_end[k])
        return follows if window is None else follows & (depth[q] - depth[k] < window)

    return mask


def plan_block_mask(trie: Trie, window: int | None, device: torch.device) -> BlockMask:
    """The blocks to compute, found from the ends of the subtrees: no matrix of N × N pairs is ever built."""
    last = _per_block(trie.subtree_end, np.maximum, 0)[None, :]
    first = _per_block(trie.subtree_end, np.minimum, len(trie.tokens))[None, :]
    begin = np.arange(last.shape[1]) * BLOCK
    q, k = begin[:, None], begin[None, :]
    some = (k <= q) & ((last > q) | (k == q))
    every = (k < q) & (first >= np.minimum(q + BLOCK, len(trie.tokens)))
    if window is not None:
        deepest = _per_block(trie.positions, np.maximum, 0)
        highest = _per_block(trie.positions, np.minimum, len(trie.tokens))
        some &= highest[:, None] - deepest[None, :] < window
        every &= deepest[:, None] - highest[None, :] < window
    partial = _listed(some & ~every, device)
    return BlockMask.from_kv_blocks(
        *partial,
        *_listed(every, device),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible(
            torch.from_numpy(trie.subtree_end).to(device), torch.from_numpy(trie.positions).to(device), window
        ),
        seq_lengths=(len(trie.tokens), len(trie.tokens)),
    )


def _per_block(values: Indexes, reduce: np.ufunc, neutral: int) -> Indexes:
    padded = np.pad(values, (0, -len(values) % BLOCK), constant_values=neutral)
    found: Indexes = reduce.reduce(padded.reshape(-1, BLOCK), axis=1)
    return found


def _listed(chosen: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block has, and which, chosen ones first; int32 [1, 1, Q] and [1, 1, Q, K]."""
    order = np.argsort(~chosen, axis=1, kind="stable").astype(np.int32)
    counts = chosen.sum(axis=1, dtype=np.int32)
    return torch.from_numpy(counts)[None, None].to(device), torch.from_numpy(order)[None, None].to(device)


_Flex = Callable[..., Tensor]


@functools.cache
def _compiled() -> _Flex:
    # Without dynamic shapes every new length of a micro-batch would be compiled again.
    return torch.compile(cast(_Flex, flex_attention), dynamic=True)


def flex_tree_attention(query: Tensor, key: Tensor, value: Tensor, plan: BlockMask, scale: float) -> Tensor:
    """[1, H, N, D] queries, [1, key heads, N, D] keys and values → [1, N, H, D]. Uncompiled away from a GPU."""
    attend = _compiled() if query.is_cuda else cast(_Flex, flex_attention)
    output = attend(query, key, value, block_mask=plan, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    return output.transpose(1, 2)
