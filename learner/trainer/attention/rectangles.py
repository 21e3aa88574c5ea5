"""Attention over a trie on the CPU: no mask, no gathered keys, no product in vain.

A token sees its own run causally, and a prefix of every run above it; consecutive tokens that see the same prefix of a
run form an unmasked rectangle with it. The parts are merged by their log-sum-exp. Backward, each part goes through the
flash kernel's own backward pass with the merged output and log-sum-exp; their sum is the exact gradient of the whole
(the identity behind ring attention).

N: trie tokens, K: key heads, G: query heads per key head, D: head width. Queries are laid out [K, N·G, D]: a range of
tokens is a view in which the G query heads of a key head count as more queries of it, so no key is ever repeated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from learner.trainer.attention.geometry import runs
from learner.trainer.attention.saved import Saved
from learner.trainer.trie import Trie

SHORT_RUN: Final = 192
"""Runs of fewer tokens are computed several at a time."""
BATCH_ROWS: Final = 1 << 13
"""Most padded tokens of short runs computed at a time; bounds the memory of their copies."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Every token of the first range sees every token of the second."""

    queries: slice
    keys: slice


@dataclass(frozen=True, slots=True)
class Run:
    """A long run, computed in place."""

    tokens: slice

    def take(self, rows: Tensor, group: int) -> Tensor:
        """[K, N·G, D] → the view [G, K, tokens, D]."""
        return split_groups(_range(rows, self.tokens, group), group).permute(2, 0, 1, 3)

    def put(self, rows: Tensor, part: Tensor) -> None:
        """Write [G, K, tokens, D] to the rows [K, N·G, D] of its tokens."""
        self.take(rows, part.shape[0]).copy_(part)


@dataclass(frozen=True, slots=True, eq=False)
class ShortRuns:
    """P runs side by side, padded to the length L of the longest of them; with K·P in the place of K heads."""

    length: int
    gather: Tensor
    """Trie place of every padded token, int64 [P·L]; padding repeats the run's last token."""
    kept: Tensor
    """Those of the P·L that are no padding."""
    tokens: Tensor
    """Their places in the trie."""

    def take(self, rows: Tensor, group: int) -> Tensor:
        """[K, N·G, D] → [G, K·P, L, D]."""
        gathered = split_groups(rows, group).index_select(1, self.gather)
        return gathered.view(-1, self.length, group, rows.shape[2]).permute(2, 0, 1, 3)

    def put(self, rows: Tensor, part: Tensor) -> None:
        """Write [G, K·P, L, D] without its padding to the rows [K, N·G, D] of its tokens."""
        group, _, _, width = part.shape
        flat = part.permute(1, 2, 0, 3).reshape(len(rows), -1, group, width)
        split_groups(rows, group)[:, self.tokens] = flat.index_select(1, self.kept).to(rows.dtype)


@dataclass(frozen=True, slots=True)
class Rectangles:
    """Causal parts and unmasked rectangles: every pair of a token and one it may see is in exactly one of them."""

    causal: tuple[Run | ShortRuns, ...]
    rectangles: tuple[Rectangle, ...]


def plan_rectangles(trie: Trie) -> Rectangles:
    """Cut a trie into runs and rectangles."""
    all_runs = runs(trie)
    short = [run for run in all_runs if run.stop - run.start < SHORT_RUN]
    return Rectangles(
        causal=(
            *(Run(run) for run in all_runs if run.stop - run.start >= SHORT_RUN),
            *(_side_by_side(group) for group in _alike(short)),
        ),
        rectangles=tuple(rectangle for run in all_runs for rectangle in _rectangles(trie, run)),
    )


def _rectangles(trie: Trie, run: slice) -> Iterator[Rectangle]:
    """Along a run the subtrees' ends fall; what lies between two of them sees the run up to where they differ."""
    ends = trie.subtree_end[run]
    for length in (np.flatnonzero(np.diff(ends)) + 1).tolist():
        yield Rectangle(
            queries=slice(int(ends[length]), int(ends[length - 1])), keys=slice(run.start, run.start + length)
        )


def _alike(short: Sequence[slice]) -> list[list[slice]]:
    """Group runs of like length, so that padding stays small and few kernels are launched."""
    groups: list[list[slice]] = []
    longest = 0
    for run in sorted(short, key=lambda run: (run.start - run.stop, run.start)):
        if not groups or longest > (run.stop - run.start) * 1.125 + 4 or longest * (len(groups[-1]) + 1) > BATCH_ROWS:
            longest = run.stop - run.start
            groups.append([])
        groups[-1].append(run)
    return groups


def _side_by_side(group: Sequence[slice]) -> ShortRuns:
    length = group[0].stop - group[0].start
    wanted = np.array([run.start for run in group])[:, None] + np.arange(length)
    gather = np.minimum(wanted, np.array([run.stop - 1 for run in group])[:, None])
    kept = np.flatnonzero(wanted == gather)
    places = gather.reshape(-1)
    return ShortRuns(length, *(torch.from_numpy(array) for array in (places, kept, places[kept])))


class _RectangleAttention(torch.autograd.Function):
    """Keeps per-token rows only: memory follows distinct tokens."""

    @staticmethod
    def forward(
        ctx: Saved[Rectangles], query: Tensor, key: Tensor, value: Tensor, plan: Rectangles, scale: float
    ) -> Tensor:
        """[K, N·G, D] queries, [K, N, D] keys and values → [K, N·G, D]."""
        group = query.shape[1] // key.shape[1]
        output = torch.empty_like(query, dtype=torch.float32)
        logsumexp = torch.empty((*query.shape[:2], 1))
        for causal in plan.causal:
            part, part_sum = _forward(
                causal.take(query, group), *_shared(causal, (key, value), group), 0.0, True, scale=scale
            )
            causal.put(output, part)
            causal.put(logsumexp, part_sum[..., None])
        for rectangle in plan.rectangles:
            keys = (rows[None, :, rectangle.keys] for rows in (key, value))
            part, part_sum = _forward(_range(query, rectangle.queries, group)[None], *keys, scale=scale)
            merged, sums = (_range(rows, rectangle.queries, group) for rows in (output, logsumexp))
            part_sum = part_sum[0, ..., None]
            merged.lerp_(part[0].float(), torch.sigmoid(part_sum - sums))
            torch.logaddexp(sums, part_sum, out=sums)
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.plan, ctx.scale = plan, scale
        return output

    @staticmethod
    def backward(ctx: Saved[Rectangles], grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, logsumexp = ctx.saved_tensors
        plan, scale = ctx.plan, ctx.scale
        group = query.shape[1] // key.shape[1]
        grads = [torch.empty_like(rows, dtype=torch.float32) for rows in (query, key, value)]
        for causal in plan.causal:
            parts = _backward(
                _without_padding(causal, causal.take(grad_output, group)),
                causal.take(query, group),
                *_shared(causal, (key, value), group),
                causal.take(output, group),
                causal.take(logsumexp, group)[..., 0],
                0.0,
                True,
                scale=scale,
            )
            causal.put(grads[0], parts[0])
            causal.put(grads[1], parts[1].sum(0, keepdim=True))
            causal.put(grads[2], parts[2].sum(0, keepdim=True))
        for rectangle in plan.rectangles:
            grad, asked, answered, sums = (
                _range(rows, rectangle.queries, group)[None] for rows in (grad_output, query, output, logsumexp)
            )
            keys = (rows[None, :, rectangle.keys] for rows in (key, value))
            parts = _backward(grad, asked, *keys, answered, sums[..., 0], 0.0, False, scale=scale)
            _range(grads[0], rectangle.queries, group).add_(parts[0][0])
            grads[1][:, rectangle.keys] += parts[1][0]
            grads[2][:, rectangle.keys] += parts[2][0]
        return *(grad.to(query.dtype) for grad in grads), None, None


def _range(rows: Tensor, tokens: slice, group: int) -> Tensor:
    """The rows of some tokens, a view of [K, N·G, D]."""
    return rows[:, tokens.start * group : tokens.stop * group]


def _shared(causal: Run | ShortRuns, keys: Sequence[Tensor], group: int) -> Iterator[Tensor]:
    """[K, N, D] → [G, …] without copies: a key is the same for all of its group."""
    return (causal.take(rows, 1).expand(group, -1, -1, -1) for rows in keys)


def _without_padding(causal: Run | ShortRuns, grad: Tensor) -> Tensor:
    """Padding has no gradient: its result was thrown away."""
    if isinstance(causal, Run) or len(causal.kept) == len(causal.gather):
        return grad
    kept = torch.zeros(len(causal.gather)).index_fill_(0, causal.kept, 1.0).view(-1, causal.length, 1)
    return grad * kept.repeat(grad.shape[1] // len(kept), 1, 1).to(grad.dtype)


def split_groups(rows: Tensor, group: int) -> Tensor:
    """[K, N·G, D] → the view [K, N, G, D]."""
    return rows.view(rows.shape[0], -1, group, rows.shape[2])


def grouped_rows(query: Tensor, key_heads: int) -> Tensor:
    """[1, K·G, N, D] → [K, N·G, D]."""
    _, heads, tokens, width = query.shape
    return query.view(key_heads, heads // key_heads, tokens, width).transpose(1, 2).reshape(key_heads, -1, width)


def ungrouped_rows(rows: Tensor, tokens: int) -> Tensor:
    """[K, N·G, D] → [1, N, K·G, D]."""
    return rows.view(rows.shape[0], tokens, -1, rows.shape[2]).transpose(0, 1).reshape(1, tokens, -1, rows.shape[2])


def rectangle_attention(query: Tensor, key: Tensor, value: Tensor, plan: Rectangles, scale: float) -> Tensor:
    """[1, K·G, N, D] queries, [1, K, N, D] keys and values → [1, N, K·G, D]."""
    rows = grouped_rows(query, key.shape[1])
    output = _RectangleAttention.apply(rows, key[0].contiguous(), value[0].contiguous(), plan, scale)  # type: ignore[no-untyped-call]
    return ungrouped_rows(output, key.shape[2])
