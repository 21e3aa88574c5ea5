"""Keys and values: one slot per running sequence, and finished sequences parked for the turns that extend them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from actors.engines.embedded.architecture import Architecture
from protocols.records import Tokens


class Slots:
    """Keys and values of the running sequences. Memory is touched (on CPU: taken) only as positions fill up."""

    def __init__(
        self, architecture: Architecture, *, slots: int, context: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        heads, size = architecture.num_key_value_heads, architecture.head_size
        self.context = context
        self.heads = heads
        self.values = torch.zeros(
            (architecture.num_hidden_layers, 2, slots, heads, context, size), device=device, dtype=dtype
        )
        """[layer, key or value, slot, head, position, head size]"""

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot to another."""
        self.values[:, :, target, :, :length] = self.values[:, :, source, :, :length]

    def take(self, slot: int, length: int) -> torch.Tensor:
        """A copy of the first `length` positions of a slot."""
        return self.values[:, :, slot, :, :length].clone()

    def put(self, slot: int, parked: torch.Tensor, length: int) -> None:
        """Fill the first `length` positions of a slot from a parked copy."""
        self.values[:, :, slot, :, :length] = parked[:, :, :, :length]


@dataclass(frozen=True, slots=True)
class Match:
    """The longest known prefix of a prompt: which entry holds it and how many of its tokens are shared."""

    entry: int
    length: int


NO_MATCH = Match(-1, 0)


def longest_prefix(tokens: NDArray[np.int32], lengths: NDArray[np.int64], prompt: Tokens) -> Match:
    """The row of `tokens` [rows, context] that shares most leading tokens with `prompt`.

    Only the first `lengths[row]` tokens of a row count, and never the whole prompt: its last token is decoded anew.
    """
    limit = min(len(prompt) - 1, tokens.shape[1])
    if limit <= 0 or not len(lengths):
        return NO_MATCH
    differs = tokens[:, :limit] != prompt[:limit]
    shared = np.where(differs.any(axis=1), differs.argmax(axis=1), limit)
    shared = np.minimum(shared, lengths)
    best = int(shared.argmax())
    return Match(best, int(shared[best])) if shared[best] else NO_MATCH


class Parked:
    """Keys and values of finished sequences, least recently used first, all computed by the weights in use.

    A follow-up turn of an episode extends such a sequence, and the episodes of a group share a prompt, so only new
    tokens are computed. Entries never outlive their weights: `clear` is called at every swap.
    """

    def __init__(self, *, entries: int, context: int, budget_tokens: int) -> None:
        self._tokens = np.full((entries, context), -1, dtype=np.int32)
        self._lengths = np.zeros(entries, dtype=np.int64)
        self._held: OrderedDict[int, torch.Tensor] = OrderedDict()
        self._free = list(range(entries))
        self._budget = budget_tokens
        self._used = 0

    def __len__(self) -> int:
        return len(self._held)

    def find(self, prompt: Tokens) -> Match:
        """The entry with the longest common prefix."""
        return longest_prefix(self._tokens, self._lengths, prompt) if self._held else NO_MATCH

    def use(self, match: Match) -> torch.Tensor:
        """The keys and values of a match. An entry that was used whole is given up: its successor will be parked."""
        held = self._held[match.entry]
        if match.length == self._lengths[match.entry]:
            self._drop(match.entry)
        else:
            self._held.move_to_end(match.entry)
        return held

    def add(self, tokens: Tokens, values: torch.Tensor) -> None:
        """Keep the keys and values of `tokens`, dropping the least recently used entries to make room."""
        length = len(tokens)
        if length > self._budget:
            return
        while not self._free or self._used + length > self._budget:
            self._drop(next(iter(self._held)))
        entry = self._free.pop()
        self._tokens[entry, :length] = tokens
        self._lengths[entry] = length
        self._held[entry] = values
        self._used += length

    def clear(self) -> None:
        """Forget everything: the weights changed."""
        for entry in list(self._held):
            self._drop(entry)

    def _drop(self, entry: int) -> None:
        del self._held[entry]
        self._used -= int(self._lengths[entry])
        self._lengths[entry] = 0
        self._free.append(entry)
