"""Attention over a trie with PyTorch's variable-length flash kernel, where FlexAttention cannot be compiled.

Every run is a sequence of its own whose keys are gathered along its path; causal with the last query on the last key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from learner.trainer.attention.geometry import chains
from learner.trainer.trie import Trie

Kernel = Callable[..., Tensor]
"""`torch.nn.attention.varlen.varlen_attn` or what has its signature."""
FLASH: Final = cast(Kernel, varlen_attn)


@dataclass(frozen=True, slots=True, eq=False)
class VarlenPlan:
    """Arguments of the kernel for one trie."""

    keys: Tensor
    """Trie place of every gathered key, int64 [R]."""
    query_ends: Tensor
    """Cumulative queries, int32, from 0."""
    key_ends: Tensor
    """Cumulative keys, int32, from 0."""
    most_queries: int
    most_keys: int
    window: int | None


def plan_varlen(trie: Trie, window: int | None, device: torch.device) -> VarlenPlan:
    """One sequence a run, in the order of the trie."""
    cut = list(chains(trie, window))
    queries = [chain.queries.stop - chain.queries.start for chain in cut]
    keys = [len(chain.keys) for chain in cut]
    return VarlenPlan(
        keys=torch.from_numpy(np.concatenate([chain.keys for chain in cut])).to(device),
        query_ends=torch.tensor(np.cumsum([0, *queries]), dtype=torch.int32, device=device),
        key_ends=torch.tensor(np.cumsum([0, *keys]), dtype=torch.int32, device=device),
        most_queries=max(queries),
        most_keys=max(keys),
        window=window,
    )


def varlen_tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: VarlenPlan,
    scale: float,
    kernel: Kernel = FLASH,
) -> Tensor:
    """[1, H, N, D] queries, [1, key heads, N, D] keys and values → [1, N, H, D]."""
    output = kernel(
        query[0].transpose(0, 1).contiguous(),
        *(rows[0].transpose(0, 1).index_select(0, plan.keys) for rows in (key, value)),
        plan.query_ends,
        plan.key_ends,
        plan.most_queries,
        plan.most_keys,
        scale=scale,
        # The kernel's window counts the tokens to the left, without the query itself.
        window_size=(-1 if plan.window is None else plan.window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[None]
