"""What attention needs to know of a micro-batch's trie, in the form each way of computing it wants, made once."""

from __future__ import annotations

from functools import cached_property

import torch
from torch.nn.attention.flex_attention import BlockMask

from learner.trainer.attention.flex import plan_block_mask
from learner.trainer.attention.packed import PaddedPaths, plan_paths
from learner.trainer.attention.rectangles import Rectangles, plan_rectangles
from learner.trainer.attention.varlen import VarlenPlan, plan_varlen
from learner.trainer.attention.windows import ChainBlock, plan_window
from learner.trainer.trie import Trie


class AttentionPlan:
    """One trie on one device. A window that no path is longer than is no window: give None."""

    def __init__(self, trie: Trie, device: torch.device) -> None:
        self._trie, self._device = trie, device
        self.tokens = len(trie.tokens)
        self.depth = int(trie.positions.max()) + 1
        """Tokens of the longest path."""
        self._windows: dict[int, tuple[ChainBlock, ...]] = {}
        self._block_masks: dict[int | None, BlockMask] = {}
        self._varlen: dict[int | None, VarlenPlan] = {}

    @cached_property
    def rectangles(self) -> Rectangles:
        return plan_rectangles(self._trie)

    @cached_property
    def paths(self) -> PaddedPaths:
        return plan_paths(self._trie, self._device)

    def window(self, window: int) -> tuple[ChainBlock, ...]:
        if window not in self._windows:
            self._windows[window] = plan_window(self._trie, window)
        return self._windows[window]

    def block_mask(self, window: int | None) -> BlockMask:
        if window not in self._block_masks:
            self._block_masks[window] = plan_block_mask(self._trie, window, self._device)
        return self._block_masks[window]

    def varlen(self, window: int | None) -> VarlenPlan:
        if window not in self._varlen:
            self._varlen[window] = plan_varlen(self._trie, window, self._device)
        return self._varlen[window]


def plan_attention(trie: Trie, device: torch.device) -> AttentionPlan:
    """Nothing is computed yet: a plan's forms are made when first asked for."""
    return AttentionPlan(trie, device)
