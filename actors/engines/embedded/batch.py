"""The running rows: every sequence's tokens, log-probabilities and versions, kept dense as rows come and go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from actors.engines.engine import Generation
from matpo.config import Sampling
from protocols.records import StopReason, Tokens


@dataclass(slots=True, eq=False)
class Request:
    """One call of `generate`, from the event loop to the worker and back."""

    prompt: Tokens
    sampling: Sampling
    answered: Callable[[], None]
    """Wakes the caller; called on its event loop."""
    result: Generation | None = field(default=None)
    failure: str = field(default="")
    """Why there will be no result."""


class Batch:
    """Rows 0 … count-1 are running. A row that leaves is replaced by the last one."""

    def __init__(self, *, rows: int, context: int) -> None:
        self.rows = rows
        self.context = context
        self.requests: list[Request] = []
        self.tokens = np.zeros((rows, context), dtype=np.int32)
        self.logprobs = np.zeros((rows, context), dtype=np.float32)
        """At the position of the token they belong to."""
        self.versions = np.zeros((rows, context), dtype=np.int32)
        self.length = np.zeros(rows, dtype=np.int64)
        """Tokens known; the last one's key and value are computed by the next decoding step."""
        self.limit = np.zeros(rows, dtype=np.int64)
        """Length at which the row must stop."""
        self.pure = np.zeros(rows, dtype=np.bool_)
        """Whether all the row's keys and values come from the weights in use."""
        self._order = np.arange(rows)

    @property
    def count(self) -> int:
        return len(self.requests)

    def join(self, request: Request) -> int:
        """Give the request the next row."""
        row, length = self.count, len(request.prompt)
        self.requests.append(request)
        self.tokens[row, :length] = request.prompt
        self.length[row] = length
        self.limit[row] = min(length + request.sampling.max_tokens, self.context)
        self.pure[row] = True
        return row

    def last_tokens(self) -> Tokens:
        """The last token of every running row [count]."""
        return self.tokens[self._order[: self.count], self.length[: self.count] - 1]

    def append(self, tokens: Tokens, logprobs: NDArray[np.float32], *, version: int) -> None:
        """Add one sampled token to every running row."""
        rows = self._order[: self.count]
        at = self.length[: self.count]
        self.tokens[rows, at] = tokens
        self.logprobs[rows, at] = logprobs
        self.versions[rows, at] = version
        self.length[: self.count] += 1

    def generation(self, row: int, *, stopped: bool) -> Generation:
        """What the row has sampled so far. `stopped`: its last token is an end token."""
        request = self.requests[row]
        sampled = slice(len(request.prompt), int(self.length[row]))
        stop: StopReason = "stop"
        if not stopped:
            stop = "length" if sampled.stop - sampled.start >= request.sampling.max_tokens else "context"
        return Generation(
            tokens=self.tokens[row, sampled].copy(),
            logprobs=self.logprobs[row, sampled].copy(),
            versions=self.versions[row, sampled].copy(),
            stop=stop,
        )

    def leave(self, row: int) -> int | None:
        """Remove a row. Returns the row whose keys and values must be copied into its place, if any."""
        last = self.count - 1
        moved = self.requests.pop()
        if row == last:
            return None
        self.requests[row] = moved
        length = self.length[last]
        self.tokens[row, :length] = self.tokens[last, :length]
        sampled = slice(len(moved.prompt), length)
        self.logprobs[row, sampled] = self.logprobs[last, sampled]
        self.versions[row, sampled] = self.versions[last, sampled]
        for state in (self.length, self.limit, self.pure):
            state[row] = state[last]
        return last
