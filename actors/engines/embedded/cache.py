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
        self.context = context
        self.heads = architecture.num_key_value_heads
        self.layers = architecture.num_hidden_layers
        shape = (slots, self.layers, 2, self.heads, context, architecture.head_size)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        """[slot, layer, key or value, head, position, head size]"""
        self._planes = self.values.view(slots, -1, context, architecture.head_size)
        self._lines = self.values.view(-1, architecture.head_size)
        # Line of position 0 of [layer, key or value, 1, head] of slot 0.
        self._first_lines = (
            (torch.arange(self._planes.shape[1]) * context).view(self.layers, 2, 1, self.heads).to(device)
        )

    def lines(self, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Where `write` puts N tokens: [layer, key or value, N · heads], for N slots and positions."""
        base = slots * (self._planes.shape[1] * self.context) + positions
        return (self._first_lines + base[:, None]).view(self.layers, 2, -1)

    def write(self, lines: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store one layer's keys and values [N, heads, size] at `lines` [key or value, N · heads]."""
        size = self._lines.shape[1]
        self._lines.index_copy_(0, lines[0], keys.reshape(-1, size))
        self._lines.index_copy_(0, lines[1], values.reshape(-1, size))

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot to another."""
        self._planes[target, :, :length] = self._planes[source, :, :length]

    def take(self, slot: int, length: int) -> torch.Tensor:
        """A copy of the first `length` positions of a slot."""
        return self._planes[slot, :, :length].clone()

    def put(self, slot: int, parked: torch.Tensor, length: int) -> None:
        """Fill the first `length` positions of a slot from a parked copy."""
        self._planes[slot, :, :length] = parked[:, :length]


@dataclass(frozen=True, slots=True)
class Match:
    """The longest known prefix of a prompt: which entry holds it and how many of its tokens are shared."""

    entry: int
    length: int
    whole: bool
    """Whether all of the entry is shared: most likely the prompt is its next turn."""


NO_MATCH = Match(-1, 0, whole=False)


def longest_prefix(tokens: NDArray[np.int32], lengths: NDArray[np.int64], prompt: Tokens) -> Match:
    """The row of `tokens` [rows, context] that shares most leading tokens with `prompt`.

    Only the first `lengths[row]` tokens of a row count, and never the whole prompt: its last token is decoded anew.
    """
    limit = min(len(prompt) - 1, tokens.shape[1])
    if limit <= 0 or not len(lengths):
        return NO_MATCH
    differs = tokens[:, :limit] != prompt[:limit]
    first = differs.argmax(axis=1)  # 0 also where nothing differs
    shared = np.minimum(np.where(differs[np.arange(len(first)), first], first, limit), lengths)
    best = int(shared.argmax())
    length = int(shared[best])
    return Match(best, length, whole=length == lengths[best]) if length else NO_MATCH


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
        if match.whole:
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
