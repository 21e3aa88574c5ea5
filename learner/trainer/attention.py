"""Causal attention over a trie, for any Hugging Face causal model whose attention function can be chosen.

Everything but attention runs once per distinct token. For attention, keys and values are gathered along the paths of
the leaves, paths of similar length side by side, and each token keeps the result of one path it lies on (all agree).
N: trie tokens, P: paths of a block, L: its length, H: heads, D: head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from learner.trainer.trie import Trie

ATTENTION: Final = "matpo_trie"
"""Value of `config._attn_implementation` that selects this module."""

BLOCK_ROWS = 1 << 15
"""Most padded path tokens attended to at once; bounds the memory of the gathered keys and values."""


@dataclass(frozen=True, slots=True, eq=False)
class PathBlock:
    """P leaf paths padded to the length L of the longest."""

    gather: Tensor
    """Trie place of every path token, int64 [P·L]; padding repeats the path's last token and is never read."""
    paths: int
    length: int
    kept_tokens: Tensor
    """Trie places whose result is taken from this block."""
    kept_rows: Tensor
    """Where in [P·L] each of them stands."""


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """How to attend over one trie; every trie token is kept by exactly one block."""

    blocks: tuple[PathBlock, ...]
    tokens: int

    @property
    def rows(self) -> int:
        """Path tokens attended to, padding included."""
        return sum(block.paths * block.length for block in self.blocks)


def plan_attention(trie: Trie, device: torch.device) -> AttentionPlan:
    """Group the leaf paths by length so that padding stays small and few kernels are launched."""
    leaves = sorted(trie.leaves, key=lambda leaf: (len(trie.paths[leaf]), leaf))
    groups: list[list[int]] = []
    for leaf in leaves:
        length = len(trie.paths[leaf])
        shortest = len(trie.paths[groups[-1][0]]) if groups else 0
        if not groups or length > shortest * 1.125 + 4 or length * (len(groups[-1]) + 1) > BLOCK_ROWS:
            groups.append([])
        groups[-1].append(leaf)
    kept = np.zeros(len(trie.tokens), np.bool_)
    blocks = []
    for group in groups:
        length = len(trie.paths[group[-1]])
        gather = np.empty((len(group), length), np.int64)
        fresh = np.zeros((len(group), length), np.bool_)
        for row, leaf in enumerate(group):
            path = trie.paths[leaf]
            gather[row, : len(path)] = path
            gather[row, len(path) :] = path[-1]
            fresh[row, : len(path)] = ~kept[path]
            kept[path] = True
        rows = np.flatnonzero(fresh)
        flat = gather.reshape(-1)
        blocks.append(
            PathBlock(
                gather=torch.from_numpy(flat).to(device),
                paths=len(group),
                length=length,
                kept_tokens=torch.from_numpy(flat[rows]).to(device),
                kept_rows=torch.from_numpy(rows).to(device),
            )
        )
    return AttentionPlan(tuple(blocks), len(trie.tokens))


def _along_paths(rows_NHD: Tensor, block: PathBlock, heads: int) -> Tensor:
    """Gather token rows along the paths as [P, H, L, D], repeating grouped key/value heads to `heads`."""
    gathered = rows_NHD.index_select(0, block.gather)
    if gathered.shape[1] != heads:
        gathered = gathered.repeat_interleave(heads // gathered.shape[1], dim=1)
    return gathered.view(block.paths, block.length, heads, -1).transpose(1, 2)


def _back_to_rows(grad_PHLD: Tensor, key_heads: int) -> Tensor:
    """[P, H, L, D] → [P·L, key heads, D], summing over the query heads that share a key head."""
    paths, heads, length, width = grad_PHLD.shape
    grad = grad_PHLD.transpose(1, 2).reshape(paths * length, heads, width)
    if key_heads != heads:
        grad = grad.view(paths * length, key_heads, heads // key_heads, width).sum(dim=2)
    return grad


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """True where query q may see key k: q - window < k <= q."""
    place = torch.arange(length, device=device)
    return (place[None, :] <= place[:, None]) & (place[None, :] > place[:, None] - window)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    if window is None or window >= query.shape[-2]:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    mask = _band(query.shape[-2], window, query.device)
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


class _PathAttention(torch.autograd.Function):
    """Saves only per-token rows and gathers again in the backward pass: memory follows distinct tokens."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: AttentionPlan,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """[N, H, D] queries and [N, key heads, D] keys and values → [N, H, D]."""
        output = torch.empty_like(query)
        heads = query.shape[1]
        sums: list[Tensor] = []
        flash = query.device.type == "cpu" and window is None
        for block in plan.blocks:
            q, k, v = (_along_paths(rows, block, heads) for rows in (query, key, value))
            if flash:
                attended, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    q, k, v, 0.0, True, scale=scale
                )
                sums.append(logsumexp)
            else:
                attended = _attend(q, k, v, scale, window)
            rows = attended.transpose(1, 2).reshape(-1, heads, query.shape[2])
            output[block.kept_tokens] = rows.index_select(0, block.kept_rows)
        ctx.save_for_backward(query, key, value, output, *sums)
        ctx.matpo = (plan, scale, window, flash)  # type: ignore[attr-defined]  # autograd's own place for constants
        return output

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, *sums = ctx.saved_tensors  # type: ignore[attr-defined]
        plan, scale, window, flash = ctx.matpo  # type: ignore[attr-defined]
        heads, key_heads = query.shape[1], key.shape[1]
        grads = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for number, block in enumerate(plan.blocks):
            q, k, v = (_along_paths(rows, block, heads) for rows in (query, key, value))
            grad_rows = grad_output.new_zeros(len(block.gather), heads, grad_output.shape[2])
            grad_rows[block.kept_rows] = grad_output.index_select(0, block.kept_tokens)
            grad = grad_rows.view(block.paths, block.length, heads, -1).transpose(1, 2)
            if flash:
                attended = _along_paths(output, block, heads)
                grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    grad, q, k, v, attended, sums[number], 0.0, True, scale=scale
                )
            else:
                with torch.enable_grad():
                    q, k, v = (leaf.detach().requires_grad_() for leaf in (q, k, v))
                    attended = _attend(q, k, v, scale, window)
                grad_q, grad_k, grad_v = torch.autograd.grad(attended, (q, k, v), grad)
            rows_q = _back_to_rows(grad_q, heads)
            grads[0][block.kept_tokens] = rows_q.index_select(0, block.kept_rows)
            grads[1].index_add_(0, block.gather, _back_to_rows(grad_k, key_heads))
            grads[2].index_add_(0, block.gather, _back_to_rows(grad_v, key_heads))
        return *grads, None, None, None


def trie_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    trie_plan: AttentionPlan | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Hugging Face's attention interface: [1, heads, N, D] tensors in, [1, N, heads, D] out."""
    if trie_plan is None or attention_mask is not None or dropout or softcap is not None or s_aux is not None:
        raise ValueError(
            f"{type(module).__name__} cannot run over a trie"
            f" (plan {trie_plan is not None}, mask {attention_mask is not None}, {dropout=}, {softcap=},"
            f" attention sinks {s_aux is not None}); only plain causal attention is supported"
        )
    # Under autocast a float32 norm may leave queries and keys wider than the values.
    rows = [tensor[0].transpose(0, 1).to(value.dtype).contiguous() for tensor in (query, key, value)]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = _PathAttention.apply(*rows, trie_plan, scale, sliding_window)  # type: ignore[no-untyped-call]
    return output[None], None


def _no_mask(*_: object, **__: object) -> None:
    """The plan replaces the mask."""


def register() -> None:
    """Make `ATTENTION` known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(ATTENTION, trie_attention)
    AttentionMaskInterface.register(ATTENTION, _no_mask)
