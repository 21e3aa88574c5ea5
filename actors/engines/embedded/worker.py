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
from matpo.config import EmbeddedEngine as Settings

PREFILL_TOKENS = 4096
"""Prompt tokens computed between two decoding steps, so that long prompts do not stall running rows."""
WORTH_WAITING_TOKENS = 16
"""A prompt that shares so many more tokens with one of the same round waits a step and copies them instead."""


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
        self.sampled_tokens = 0
        self._device = torch.device(settings.device)
        self._architecture = architecture
        self._post = post
        self._ends = np.array(ends, dtype=np.int32)
        context, rows = settings.max_context_tokens, settings.max_batch
        dtype = torch.float32 if settings.dtype == "float32" else torch.bfloat16
        self._slots = Slots(architecture, slots=rows, context=context, device=self._device, dtype=dtype)
        self._parked = Parked(entries=4 * rows, context=context, budget_tokens=rows * context // 2)
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
        """Serve until `Stop`. Blocks on the mailbox while there is nothing to decode."""
        with torch.inference_mode():
            while self._read_mail():
                if self._parameters is not None:
                    self._admit(self._parameters)
                    if self._batch.count:
                        self._step(self._parameters)

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
        """Start waiting requests while rows are free: copy the known prefix, compute the rest of the prompt."""
        batch, before, budget = self._batch, self._batch.count, PREFILL_TOKENS
        pieces: list[Piece] = []
        deferred: list[Request] = []
        while self._waiting and batch.count < batch.rows and budget > 0:
            request = self._waiting.popleft()
            parked = self._parked.find(request.prompt)
            running = NO_MATCH if parked.whole else self._find_running(request, before)
            reused = max(parked.length, running.length)
            if not parked.whole and self._find_fresh(request, before).length > reused + WORTH_WAITING_TOKENS:
                deferred.append(request)
                continue
            row = batch.join(request)
            if reused and parked.length == reused:
                self._slots.put(row, self._parked.use(parked), reused)
            elif reused:
                self._slots.copy(running.entry, row, reused)
            pieces.append(Piece(row, reused, request.prompt[reused:-1]))
            budget -= len(request.prompt) - reused
        self._waiting.extendleft(reversed(deferred))
        if pieces:
            self._sampling = None
            self._decoder.extend(parameters, pieces)

    def _find_running(self, request: Request, rows: int) -> Match:
        """The longest prefix whose keys and values a running row holds (all but those of its last token)."""
        lengths = np.where(self._batch.pure[:rows], self._batch.length[:rows] - 1, 0)
        return longest_prefix(self._batch.tokens[:rows], lengths, request.prompt)

    def _find_fresh(self, request: Request, before: int) -> Match:
        """The longest prefix that a row admitted in this round is about to compute."""
        rows = slice(before, self._batch.count)
        return longest_prefix(self._batch.tokens[rows], self._batch.length[rows] - 1, request.prompt)

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
        tokens = drawn.to("cpu", torch.int32).numpy()
        batch.append(tokens, logprobs.cpu().numpy(), version=self.version)
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
            if self._batch.pure[row]:
                length = int(self._batch.length[row]) - 1
                self._parked.add(self._batch.tokens[row, :length], self._slots.take(row, length))
            self._remove(row)
        self._post(lambda: _call_all(answered))

    def _remove(self, row: int) -> None:
        last = self._batch.leave(row)
        if last is not None:
            self._slots.copy(last, row, int(self._batch.length[row]))
        self._sampling = None


def _call_all(callbacks: list[Callable[[], None]]) -> None:
    for callback in callbacks:
        callback()
