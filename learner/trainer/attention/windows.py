"""Sliding-window attention over a trie on the CPU, by depth: a token sees the last `window` tokens of its path.

Runs are cut into chains; several of like length are computed at a time with their keys gathered along the path and the
window as a mask. Every token is a query once, so the work is that of a window over distinct tokens.

N: trie tokens, K: key heads, G: query heads per key head, D: head width; P chains of L queries and M keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from learner.trainer.attention.geometry import Chain, chains
from learner.trainer.attention.rectangles import grouped_rows, split_groups, ungrouped_rows
from learner.trainer.attention.saved import Saved
from learner.trainer.trie import Trie

LONGEST_CHAIN: Final = 128
MASK_ENTRIES: Final = 1 << 20
"""Most pairs of query and key, padding included, computed at a time; the mask has G times as many entries."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True, eq=False)
class ChainBlock:
    """P chains, padded."""

    queries: Tensor
    """Trie places [P, L]; padding repeats the last."""
    kept: Tensor
    """Those of the P·L that are no padding."""
    tokens: Tensor
    """Their places in the trie."""
    keys: Tensor
    """Trie places [P, M]; padding repeats the last."""
    hidden: Tensor
    """bool [P, L, M]: what a query must not see."""


def plan_window(trie: Trie, window: int) -> tuple[ChainBlock, ...]:
    """Every token is kept by exactly one block."""
    cut = sorted(chains(trie, window, LONGEST_CHAIN), key=lambda chain: (len(chain.keys), chain.queries.start))
    groups: list[list[Chain]] = []
    for chain in cut:
        least = len(groups[-1][0].keys) if groups else 0
        padded = LONGEST_CHAIN * len(chain.keys) * (len(groups[-1]) + 1 if groups else 1)
        if not groups or len(chain.keys) > least * 1.125 + 4 or padded > MASK_ENTRIES:
            groups.append([])
        groups[-1].append(chain)
    return tuple(_block(trie, window, group) for group in groups)


def _block(trie: Trie, window: int, group: list[Chain]) -> ChainBlock:
    queries = _padded([np.arange(chain.queries.start, chain.queries.stop) for chain in group])
    keys = _padded([chain.keys for chain in group])
    asked, answering = trie.positions[queries][:, :, None], trie.positions[keys][:, None, :]
    spare = np.arange(keys.shape[1]) >= np.array([len(chain.keys) for chain in group])[:, None]
    hidden = (answering > asked) | (answering <= asked - window) | spare[:, None, :]
    lengths = np.array([chain.queries.stop - chain.queries.start for chain in group])
    kept = np.flatnonzero(np.arange(queries.shape[1]) < lengths[:, None])
    return ChainBlock(*map(torch.from_numpy, (queries, kept, queries.reshape(-1)[kept], keys, hidden)))


def _padded(rows: list[np.ndarray]) -> np.ndarray:
    longest = max(len(row) for row in rows)
    return np.stack([np.pad(row, (0, longest - len(row)), mode="edge") for row in rows])


class _WindowAttention(torch.autograd.Function):
    """Keeps per-token rows only and gathers again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Saved[tuple[ChainBlock, ...]],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: tuple[ChainBlock, ...],
        scale: float,
    ) -> Tensor:
        """[K, N·G, D] queries, [K, N, D] keys and values → [K, N·G, D]."""
        output = torch.empty_like(query)
        sums: list[Tensor] = []
        for block in plan:
            q, k, v, mask = _inputs(block, query, key, value)
            part, part_sum = _forward(q, k, v, attn_mask=mask, scale=scale)
            _put(block, output, part)
            sums.append(part_sum)
        ctx.save_for_backward(query, key, value, output, *sums)
        ctx.plan, ctx.scale = plan, scale
        return output

    @staticmethod
    def backward(ctx: Saved[tuple[ChainBlock, ...]], grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, *sums = ctx.saved_tensors
        plan, scale = ctx.plan, ctx.scale
        group = query.shape[1] // key.shape[1]
        grads = [torch.zeros_like(rows, dtype=torch.float32) for rows in (query, key, value)]
        for block, logsumexp in zip(plan, sums, strict=True):
            q, k, v, mask = _inputs(block, query, key, value)
            padding = torch.ones(block.queries.numel(), dtype=torch.bool).index_fill_(0, block.kept, False)
            grad = _take(grad_output, block.queries, group)
            grad = grad.masked_fill(padding.view(len(q), 1, -1, 1).repeat_interleave(group, 2), 0)
            answered = _take(output, block.queries, group)
            parts = _backward(grad, q, k, v, answered, logsumexp, 0.0, False, attn_mask=mask, scale=scale)
            _put(block, grads[0], parts[0])
            for whole, part in zip(grads[1:], parts[1:], strict=True):
                whole.index_add_(1, block.keys.reshape(-1), part.transpose(0, 1).flatten(1, 2).float())
        return *(grad.to(query.dtype) for grad in grads), None, None


def _inputs(block: ChainBlock, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[P, K, L·G, D] queries, [P, K, M, D] keys and values, and the mask [P, 1, L·G, M] to add to their scores."""
    group = query.shape[1] // key.shape[1]
    mask = torch.zeros(block.hidden.shape, dtype=query.dtype).masked_fill_(block.hidden, -torch.inf)
    rows = (_take(query, block.queries, group), _take(key, block.keys, 1), _take(value, block.keys, 1))
    return *rows, mask.repeat_interleave(group, 1)[:, None]


def _take(rows: Tensor, places: Tensor, group: int) -> Tensor:
    """[K, N·G, D] → [P, K, L·G, D] for places [P, L]."""
    gathered = split_groups(rows, group).index_select(1, places.reshape(-1))
    return gathered.view(len(rows), len(places), -1, rows.shape[2]).transpose(0, 1)


def _put(block: ChainBlock, rows: Tensor, part: Tensor) -> None:
    """Write [P, K, L·G, D] without its padding to the rows [K, N·G, D] of its tokens."""
    flat = part.transpose(0, 1).reshape(len(rows), block.queries.numel(), -1, rows.shape[2])
    split_groups(rows, flat.shape[2])[:, block.tokens] = flat.index_select(1, block.kept).to(rows.dtype)


def window_attention(query: Tensor, key: Tensor, value: Tensor, plan: tuple[ChainBlock, ...], scale: float) -> Tensor:
    """[1, K·G, N, D] queries, [1, K, N, D] keys and values → [1, N, K·G, D]."""
    rows = grouped_rows(query, key.shape[1])
    output = _WindowAttention.apply(rows, key[0].contiguous(), value[0].contiguous(), plan, scale)  # type: ignore[no-untyped-call]
    return ungrouped_rows(output, key.shape[2])
