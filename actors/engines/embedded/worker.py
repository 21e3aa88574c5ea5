"""The engine's thread: takes requests and weights from a mailbox, batches them continuously, and answers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue

import numpy as np
import torch
from numpy.typing import NDArray

from actors.engines.embedded.architecture import Architecture
from actors.engines.embedded.batch import Batch, Request
from actors.engines.embedded.cache import NO_MATCH, Match, Parked, Slots, longest_prefix
from actors.engines.embedded.decoder import Decoder, Piece
from actors.engines.embedded.parameters import Parameters
from actors.engines.embedded.sampler import SamplingRows, sample
from actors.engines.engine import EngineFailure
from matpo.config import EmbeddedEngine as Settings
from protocols.records import Tokens

PREFILL_TOKENS = 4096
"""Prompt tokens computed between two decoding steps, so that long prompts do not stall running rows."""
WORTH_WAITING_TOKENS = 16
"""A prompt that shares so many more tokens with one of the same round waits a step and copies them instead."""
MOST_FAILURES = 3
"""Rounds that may fail in a row."""


@dataclass(frozen=True, slots=True, eq=False)
class Submit:
    request: Request


@dataclass(frozen=True, slots=True, eq=False)
class Abandon:
    """The caller is gone: free the row."""

    request: Request


@dataclass(slots=True, eq=False)
class Swap:
    """New weights for the next decoding step."""

    parameters: Parameters
    version: int
    answered: Callable[[], None]
    pause_s: float = field(default=0.0)


@dataclass(frozen=True, slots=True)
class Stop:
    """End the thread; nobody waits for an answer any more."""


Mail = Submit | Abandon | Swap | Stop


class Worker:
    """Owned by one thread; others only put mail in the box and read the counters."""

    def __init__(
        self,
        architecture: Architecture,
        settings: Settings,
        *,
        ends: tuple[int, ...],
        seed: int,
        post: Callable[[Callable[[], None]], object],
    ) -> None:
        """`post` runs a callback on the event loop."""
        self.mail: SimpleQueue[Mail] = SimpleQueue()
        self.version = -1
        self.sampled_tokens = self.prompt_tokens = self.cached_tokens = 0
        self.failure = ""
        """Why the last round failed; empty after one that did not."""
        self._device = torch.device(settings.device)
        self._architecture = architecture
        self._post = post
        self._ends = np.array(ends, dtype=np.int32)
        context, rows = settings.max_context_tokens, settings.max_batch
        dtype = torch.float32 if settings.dtype == "float32" else torch.bfloat16
        self._slots = Slots(architecture, slots=rows, context=context, device=self._device, dtype=dtype)
        self._parked = Parked(entries=4 * rows, context=context, budget_tokens=settings.kept_tokens)
        self._reuses = settings.kept_tokens > 0
        self._failures = 0
        self._batch = Batch(rows=rows, context=context)
        self._decoder = Decoder(architecture, self._slots)
        self._waiting: deque[Request] = deque()
        self._parameters: Parameters | None = None
        self._sampling: SamplingRows | None = None
        self._generator = torch.Generator(self._device)
        self._generator.manual_seed(seed)

    @property
    def running(self) -> int:
        return self._batch.count

    @property
    def waiting(self) -> int:
        return len(self._waiting) + self.mail.qsize()

    def run(self) -> None:
        """Serve until `Stop`. Blocks on the mailbox while there is nothing to decode.

        A round that fails takes its running requests with it, and the next begins with empty slots. Raises
        `EngineFailure` after some failures in a row: a device that is lost comes back with a new process only.
        """
        with torch.inference_mode():
            while self._read_mail():
                if self._parameters is not None:
                    try:
                        self._round(self._parameters)
                    except (RuntimeError, MemoryError, FloatingPointError) as error:  # a full device is a RuntimeError
                        self._fail(error)

    def _round(self, parameters: Parameters) -> None:
        self._admit(parameters)
        if self._batch.count:
            self._step(parameters)
            self._failures, self.failure = 0, ""

    def _fail(self, error: Exception) -> None:
        self._failures += 1
        self.failure = f"version {self.version} on {self._device}: {reason_of(error)}"
        failed = self._batch.requests
        self._batch.requests = []
        self._sampling = None
        self._parked.clear()
        self._slots.values.zero_()
        for request in failed:
            request.failure = self.failure
        if self._failures == MOST_FAILURES:
            raise EngineFailure(f"the embedded engine failed {MOST_FAILURES} times in a row; {self.failure}") from error
        self._post(lambda: _call_all([request.answered for request in failed]))

    def _read_mail(self) -> bool:
        """Handle all mail; wait for some when idle. False at `Stop`."""
        while True:
            idle = self._parameters is None or not (self._batch.count or self._waiting)
            if not idle and self.mail.empty():
                return True
            match self.mail.get():
                case Submit(request):
                    self._waiting.append(request)
                case Abandon(request):
                    self._abandon(request)
                case Swap() as swap:
                    self._swap(swap)
                case Stop():
                    return False

    def _swap(self, swap: Swap) -> None:
        """Rows in flight keep the keys and values they have; everything parked is of the old weights and goes."""
        began = time.perf_counter()
        self._parameters, self.version = swap.parameters, swap.version
        self._batch.pure[:] = False
        self._parked.clear()
        swap.pause_s = time.perf_counter() - began
        self._post(swap.answered)

    def _abandon(self, request: Request) -> None:
        if request in self._waiting:
            self._waiting.remove(request)
        elif request in self._batch.requests:
            self._remove(self._batch.requests.index(request))

    def _admit(self, parameters: Parameters) -> None:
        """Start waiting requests while rows are free: copy the known prefix, compute the rest of the prompt.

        A prompt worth waiting for keeps its place in the queue and its row: nobody overtakes it.
        """
        batch, before, budget = self._batch, self._batch.count, PREFILL_TOKENS
        pieces: list[Piece] = []
        deferred: list[Request] = []
        try:
            while self._waiting and batch.count + len(deferred) < batch.rows and budget > 0:
                request = self._waiting.popleft()
                parked, running, fresh = self._find(request.prompt, before)
                reused = max(parked.length, running.length)
                if fresh.length > reused + WORTH_WAITING_TOKENS:
                    deferred.append(request)
                    continue
                row = batch.join(request)
                if reused and parked.length == reused:
                    self._slots.put(row, self._parked.use(parked), reused)
                elif reused:
                    self._slots.copy(running.entry, row, reused)
                pieces.append(Piece(row, reused, request.prompt[reused:-1]))
                budget -= len(request.prompt) - reused
                self.prompt_tokens += len(request.prompt)
                self.cached_tokens += reused
        finally:
            self._waiting.extendleft(reversed(deferred))
        if pieces:
            self._sampling = None
            self._decoder.extend(parameters, pieces)

    def _find(self, prompt: Tokens, before: int) -> tuple[Match, Match, Match]:
        """The longest known prefix: parked; held by a row that was running before this round (all but the key and
        value of its last token); about to be computed by a row admitted in this round."""
        if not self._reuses:
            return NO_MATCH, NO_MATCH, NO_MATCH
        tokens, lengths = self._batch.tokens, self._batch.length - 1
        held = np.where(self._batch.pure[:before], lengths[:before], 0)
        fresh = slice(before, self._batch.count)
        return (
            self._parked.find(prompt),
            longest_prefix(tokens[:before], held, prompt),
            longest_prefix(tokens[fresh], lengths[fresh], prompt),
        )

    def _step(self, parameters: Parameters) -> None:
        """Sample one token for every running row and answer those that are done."""
        batch = self._batch
        rows = batch.count
        if self._sampling is None:
            self._sampling = SamplingRows.of(
                [r.sampling for r in batch.requests], vocabulary=self._architecture.vocab_size, device=self._device
            )
        at = batch.length[:rows] - 1
        logits = self._decoder.decode(parameters, batch.last_tokens(), at)
        drawn, logprobs = sample(logits, self._sampling, self._generator)
        tokens, chances = drawn.to("cpu", torch.int32).numpy(), logprobs.cpu().numpy()
        if not np.isfinite(chances).all():
            raise FloatingPointError("the model's logits are not all finite numbers")
        batch.append(tokens, chances, version=self.version)
        self.sampled_tokens += rows
        ended = np.isin(tokens, self._ends)
        finished = np.flatnonzero(ended | (batch.length[:rows] >= batch.limit[:rows]))
        if len(finished):
            self._finish(finished[::-1].tolist(), ended)

    def _finish(self, rows: list[int], ended: NDArray[np.bool_]) -> None:
        """Answer finished rows, last row first, and park what they computed for the turn that may follow."""
        answered: list[Callable[[], None]] = []
        for row in rows:
            request = self._batch.requests[row]
            request.result = self._batch.generation(row, stopped=bool(ended[row]))
            answered.append(request.answered)
            if self._reuses and self._batch.pure[row]:
                length = int(self._batch.length[row]) - 1
                self._parked.add(self._batch.tokens[row, :length], self._slots.take(row, length))
            self._remove(row)
        self._post(lambda: _call_all(answered))

    def _remove(self, row: int) -> None:
        last = self._batch.leave(row)
        if last is not None:
            self._slots.copy(last, row, int(self._batch.length[row]))
        self._sampling = None


def reason_of(error: Exception) -> str:
    """Its first line; torch adds pages, and a lack of memory may say nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


def _call_all(callbacks: list[Callable[[], None]]) -> None:
    for callback in callbacks:
        callback()
