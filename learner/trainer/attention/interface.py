"""Attention over a trie as Hugging Face models call it: every way is an attention implementation of its own name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from learner.trainer.attention.flex import flex_tree_attention
from learner.trainer.attention.plan import AttentionPlan
from learner.trainer.attention.rectangles import rectangle_attention
from learner.trainer.attention.varlen import varlen_tree_attention
from learner.trainer.attention.windows import window_attention
from matpo.attention_config import TreeAttention

Attend = Callable[[Tensor, Tensor, Tensor, AttentionPlan, int | None, float], Tensor]
"""([1, H, N, D] queries, [1, key heads, N, D] keys, values, plan, window, scale) → [1, N, H, D]."""


def _rectangle(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, window: int | None, scale: float) -> Tensor:
    if window is None:
        return rectangle_attention(q, k, v, plan.rectangles, scale)
    return window_attention(q, k, v, plan.window(window), scale)


def _flex(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, window: int | None, scale: float) -> Tensor:
    return flex_tree_attention(q, k, v, plan.block_mask(window), scale)


def _varlen(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, window: int | None, scale: float) -> Tensor:
    return varlen_tree_attention(q, k, v, plan.varlen(window), scale)


WAYS: Final[dict[TreeAttention, Attend]] = {"rectangle": _rectangle, "flex": _flex, "varlen": _varlen}


def implementation(way: TreeAttention) -> str:
    """Value of `config._attn_implementation` that selects a way."""
    return f"matpo_{way}"


class TrieAttention:
    """One way, with the signature transformers calls: [1, heads, N, D] tensors in, [1, N, heads, D] out."""

    def __init__(self, attend: Attend) -> None:
        self._attend = attend

    def __call__(
        self,
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
        if trie_plan is None or attention_mask is not None or dropout or softcap is not None or s_aux is not None:
            raise ValueError(
                f"{type(module).__name__} cannot run over a trie"
                f" (plan {trie_plan is not None}, mask {attention_mask is not None}, {dropout=}, {softcap=},"
                f" attention sinks {s_aux is not None}); only plain causal attention is supported"
            )
        if value.shape[-1] != key.shape[-1]:
            raise ValueError(
                f"{type(module).__name__} cannot run over a trie: its values are {value.shape[-1]} wide,"
                f" its keys {key.shape[-1]}"
            )
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        window = None if sliding_window is None or sliding_window >= trie_plan.depth else sliding_window
        # Under autocast a float32 norm may leave queries and keys wider than the values.
        return self._attend(query.to(value.dtype), key.to(value.dtype), value, trie_plan, window, scale), None


def _no_mask(*_: object, **__: object) -> None:
    """The plan replaces the mask."""


def register() -> None:
    """Make every way known to transformers. Calling it again changes nothing."""
    for way, attend in WAYS.items():
        AttentionInterface.register(implementation(way), TrieAttention(attend))
        AttentionMaskInterface.register(implementation(way), _no_mask)
