"""What a model's arithmetic costs: one documented count of floating-point operations, forward and backward.

It plans micro-batches, balances ranks, and says in the metrics what prefix sharing saved.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Work:
    """How much of each kind of arithmetic there is."""

    tokens: int = 0
    """That run through the model's layers."""
    pairs: int = 0
    """Attended: a query and a key it may see, once per layer and head."""
    scored: int = 0
    """Tokens whose log-probability is computed."""

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.pairs + other.pairs, self.scored + other.scored)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the cost of a token depends on."""

    body_parameters: int
    """Of the matrices every token is multiplied with: all but the embedding and the output projection."""
    trained_parameters: int
    """Of those, the ones that get a gradient."""
    layers: int
    attention_width: int
    """Query heads times their width."""
    hidden: int
    vocabulary: int
    head_trained: bool = True

    def flops(self, work: Work) -> int:
        """Of forward and backward: each product of the forward pass takes two more of its size in the backward pass,
        for the gradients of its two factors; a frozen matrix saves its own.

        4·P + 2·T per token, where T of the P parameters are trained; 12·d·L per attended pair (two products of 2·d
        operations in each of L layers); 6·V·E per scored token, 4·V·E if the output projection is frozen.
        """
        head = 6 if self.head_trained else 4
        return (
            (4 * self.body_parameters + 2 * self.trained_parameters) * work.tokens
            + 12 * self.attention_width * self.layers * work.pairs
            + head * self.vocabulary * self.hidden * work.scored
        )


TOKENS_ALONE = ModelShape(body_parameters=1, trained_parameters=1, layers=0, attention_width=0, hidden=0, vocabulary=0)
"""The shape for callers without a model: every token costs the same."""

PADDED_ROWS = 8
"""Sequences of a padded micro-batch, where the cost of padding is counted."""


def causal_pairs(length: int) -> int:
    """Pairs of causal attention over a sequence."""
    return length * (length + 1) // 2


def packed_work(lengths: Iterable[int], scored: int) -> Work:
    """Of sequences laid side by side without padding, each attending to itself alone and nothing shared."""
    known = list(lengths)
    return Work(sum(known), sum(map(causal_pairs, known)), scored)


def padded_work(lengths: NDArray[np.int64], scored: int) -> Work:
    """Of sequences in rows of `PADDED_ROWS` as they come, each padded to the longest beside it; nothing shared."""
    total = Work(scored=scored)
    for start in range(0, len(lengths), PADDED_ROWS):
        rows = lengths[start : start + PADDED_ROWS]
        longest = int(rows.max())
        total += Work(longest * len(rows), causal_pairs(longest) * len(rows))
    return total
