"""Without sharing: the paths of the leaves as plain sequences, for models that cannot run over a trie.

A causal model's hidden state of a token depends on its path alone, so each trie token keeps that of one path it lies on
and the gradient is exact; but what the paths share is computed once for each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from learner.trainer.costs import causal_pairs
from learner.trainer.trie import Trie

BLOCK_TOKENS: Final = 1 << 13
"""Most padded tokens in one forward pass, unless a single path is longer."""


@dataclass(frozen=True, slots=True, eq=False)
class PathBlock:
    """Paths of like length; padding stands at the right, where a causal model's results cannot depend on it."""

    tokens: Tensor
    """Trie places [P, L]; padding repeats the path's last token."""
    kept: Tensor
    """Those of the P·L whose hidden state is taken from here."""


@dataclass(frozen=True, slots=True, eq=False)
class PaddedPaths:
    """All leaf paths; every trie token is kept once."""

    blocks: tuple[PathBlock, ...]
    order: Tensor
    """Where each trie token stands among all kept ones, [N]."""
    rows: int
    """Tokens computed, padding included."""
    pairs: int
    """Of causal attention over them."""


def plan_paths(trie: Trie, device: torch.device) -> PaddedPaths:
    """Group the leaf paths by length, so that padding stays small."""
    groups: list[list[int]] = []
    for leaf in sorted(trie.leaves, key=lambda leaf: (len(trie.paths[leaf]), leaf)):
        length = len(trie.paths[leaf])
        shortest = len(trie.paths[groups[-1][0]]) if groups else 0
        if not groups or length > shortest * 1.125 + 4 or length * (len(groups[-1]) + 1) > BLOCK_TOKENS:
            groups.append([])
        groups[-1].append(leaf)
    taken = np.zeros(len(trie.tokens), np.bool_)
    blocks, order = [], []
    for group in groups:
        length = len(trie.paths[group[-1]])
        tokens = np.stack(
            [np.pad(trie.paths[leaf], (0, length - len(trie.paths[leaf])), mode="edge") for leaf in group]
        )
        places, first = np.unique(tokens, return_index=True)
        fresh = ~taken[places]
        taken[places] = True
        order.append(places[fresh])
        blocks.append(PathBlock(torch.from_numpy(tokens).to(device), torch.from_numpy(first[fresh]).to(device)))
    return PaddedPaths(
        blocks=tuple(blocks),
        order=torch.from_numpy(np.argsort(np.concatenate(order))).to(device),
        rows=sum(block.tokens.numel() for block in blocks),
        pairs=sum(len(block.tokens) * causal_pairs(block.tokens.shape[1]) for block in blocks),
    )


def hidden_of_paths(forward: Callable[[Tensor], Tensor], tokens_N: Tensor, plan: PaddedPaths) -> Tensor:
    """Hidden states [N, E] of a trie's tokens; `forward` maps token ids [P, L] to theirs [P, L, E]."""
    parts = [forward(tokens_N[block.tokens]).flatten(0, 1).index_select(0, block.kept) for block in plan.blocks]
    return torch.cat(parts).index_select(0, plan.order)
