"""Which sequences run together: micro-batches that recompute as little as possible, even across ranks. Pure functions.

Sorted, the sequences of a step are a depth-first walk of their trie: trees of one task, whose prompts begin alike, lie
side by side. A micro-batch is a piece of that walk, and every cut costs the prefix that is shared across it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from learner.trainer.costs import ModelShape, Work, causal_pairs
from learner.trainer.trie import lexicographic
from protocols.records import Flags, Floats, Tokens

MICRO_BATCH_TOKENS = 32
"""A micro-batch costs about what this many tokens cost beside its own: a pass over every weight's gradient."""
SLACK = (1.0, 1.05, 1.1, 1.2, 1.4)
"""How far above the mean the costliest micro-batch may lie, tried in turn when several ranks must keep step."""
MORE_ROUNDS = 3
"""Micro-batches per rank beyond the fewest possible that are tried."""

Costs = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One trajectory as the loss sees it. Lengths agree as in `protocols.records.Trajectory`."""

    role: str
    tokens: Tokens
    sampled: Flags
    behaviour: Floats
    """log μ of each sampled token."""
    advantage: float
    weight: float
    """Weight of each sampled token in the step's loss."""
    temperature: float
    """At which the tokens were sampled; π is taken at the same one."""
    adapter: str = ""
    """Which of several adapters played and is trained."""

    def __post_init__(self) -> None:
        if not self.sampled[1:].any() or self.sampled[0]:
            raise ValueError(
                f"a {self.role} trajectory of {len(self.tokens)} tokens must sample some, and not its first"
            )

    @property
    def inputs(self) -> Tokens:
        """The tokens the model must read: all before the last sampled one."""
        return self.tokens[: int(np.flatnonzero(self.sampled)[-1])]


MicroBatches = tuple[tuple[Sample, ...], ...]


def plan(
    samples: Sequence[Sample], *, limit_tokens: int, shape: ModelShape, ranks: int = 1
) -> tuple[MicroBatches, ...]:
    """Per rank, the samples of each of its micro-batches; every rank has equally many, to keep step in collectives.

    A micro-batch computes at most `limit_tokens` distinct tokens (a longer sequence gets one of its own). One rank: the
    least arithmetic in all. Several: the n-th micro-batches of all ranks cost about the same, and the plan is the one
    that ends first when all wait for the slowest. A micro-batch is empty only if no other holds two samples.
    """
    if not samples:
        return ((),) * ranks
    walk = _Walk.of(samples, shape)
    best = _in_rounds(walk.cut(limit_tokens, math.inf), walk, ranks)
    if ranks > 1:
        whole, fewest = sum(map(walk.cost, walk.cut(limit_tokens, math.inf))), len(best)
        bounds = [slack * whole / (rounds * ranks) for rounds in range(fewest, fewest + MORE_ROUNDS) for slack in SLACK]
        tried = [best, *(_in_rounds(walk.cut(limit_tokens, bound), walk, ranks) for bound in bounds)]
        best = min(tried, key=lambda rounds: sum(max(map(walk.cost, pieces)) for pieces in rounds))
    return tuple(
        tuple(tuple(samples[walk.order[place]] for place in range(*pieces[rank])) for pieces in best)
        for rank in range(ranks)
    )


Piece = tuple[int, int]
"""Places [start, end) of the walk."""


@dataclass(frozen=True, slots=True, eq=False)
class _Walk:
    """The samples in trie order. Running sums count only what a sample adds to the ones before it."""

    order: tuple[int, ...]
    whole_tokens: Counts
    """Of each sample alone."""
    whole_cost: Costs
    added_tokens: Counts
    """Up to each place: n + 1 running sums."""
    added_cost: Costs
    overhead: float

    @classmethod
    def of(cls, samples: Sequence[Sample], shape: ModelShape) -> _Walk:
        order, shared = lexicographic([sample.inputs for sample in samples])
        whole, added = [], []
        for index, common in zip(order, shared, strict=True):
            sample = samples[index]
            length = len(sample.inputs)
            alone = Work(length, causal_pairs(length), int(sample.sampled.sum()))
            # A token scored inside the shared prefix is taken to be scored by the neighbour too.
            again = Work(common, causal_pairs(common), int(sample.sampled[:common].sum()))
            whole.append((length, shape.flops(alone)))
            added.append((length - common, shape.flops(alone) - shape.flops(again)))
        return cls(
            order=tuple(order),
            whole_tokens=np.array([tokens for tokens, _ in whole], np.int64),
            whole_cost=np.array([cost for _, cost in whole], np.float64),
            added_tokens=np.cumsum([0, *(tokens for tokens, _ in added)], dtype=np.int64),
            added_cost=np.cumsum([0.0, *(cost for _, cost in added)], dtype=np.float64),
            overhead=float(shape.flops(Work(tokens=MICRO_BATCH_TOKENS))),
        )

    def cost(self, piece: Piece) -> float:
        """Of one micro-batch, in floating-point operations."""
        start, end = piece
        if start == end:
            return 0.0
        return float(self.whole_cost[start] + self.added_cost[end] - self.added_cost[start + 1]) + self.overhead

    def cut(self, limit_tokens: int, limit_cost: float) -> list[Piece]:
        """Pieces within both limits whose cost sums to the least (dynamic programming over the last cut)."""
        count = len(self.order)
        least = np.zeros(count + 1)
        last = np.zeros(count + 1, np.int64)
        for end in range(1, count + 1):
            tokens_before = self.added_tokens[end] - limit_tokens
            first = min(int(np.searchsorted(self.added_tokens[:end], tokens_before)), end - 1)
            starts = slice(first, end)
            follow = slice(first + 1, end + 1)
            tokens = self.whole_tokens[starts] + self.added_tokens[end] - self.added_tokens[follow]
            costs = self.whole_cost[starts] + self.added_cost[end] - self.added_cost[follow] + self.overhead
            allowed = (tokens <= limit_tokens) & (costs <= limit_cost)
            allowed[-1] = True  # a sample on its own, however long
            totals = np.where(allowed, least[starts] + costs, math.inf)
            chosen = int(totals.argmin())
            least[end], last[end] = totals[chosen], first + chosen
        pieces = []
        end = count
        while end:
            pieces.append((int(last[end]), end))
            end = int(last[end])
        return pieces[::-1]

    def halves(self, piece: Piece) -> tuple[Piece, Piece]:
        """The cut of a piece of two or more samples whose costlier half is cheapest."""
        start, end = piece
        middle = min(range(start + 1, end), key=lambda place: max(self.cost((start, place)), self.cost((place, end))))
        return (start, middle), (middle, end)


def _in_rounds(pieces: list[Piece], walk: _Walk, ranks: int) -> list[list[Piece]]:
    """Rounds of one piece per rank, of similar cost; the costliest pieces are halved until the rounds are full."""
    pieces = sorted(pieces, key=walk.cost, reverse=True)
    while len(pieces) % ranks:
        divisible = next((number for number, (start, end) in enumerate(pieces) if end - start > 1), None)
        if divisible is None:
            pieces.append((len(walk.order), len(walk.order)))
        else:
            pieces = sorted([*pieces[:divisible], *walk.halves(pieces[divisible]), *pieces[divisible + 1 :]],
                            key=walk.cost, reverse=True)  # fmt: skip
    return [pieces[start : start + ranks] for start in range(0, len(pieces), ranks)]
