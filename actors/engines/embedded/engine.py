"""The in-process engine: continuous batching on torch in one thread, weights swapped between two decoding steps.

Over a swap, running requests go on from their tokens with the keys and values they have ("in place"): every token's
log-probability is that of the distribution it was really drawn from, which is what off-policy correction needs, and
generation never stops to recompute prompts. New requests never reuse keys and values of older weights.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Self

import anyio
import anyio.to_thread
import torch

from actors.engines.embedded.architecture import Architecture, read_architecture, read_end_tokens
from actors.engines.embedded.batch import Request
from actors.engines.embedded.parameters import Parameters, load_parameters
from actors.engines.embedded.worker import Abandon, Stop, Submit, Swap, Worker, reason_of
from actors.engines.engine import EngineFailure, EngineHealth, Generation, LoadReport, check_prompt
from actors.engines.folder import read_model_weights
from matpo.adapters import Shape, adapter_shapes, check_shapes, merged, only
from matpo.config import EmbeddedEngine as Settings
from matpo.config import Lora, Sampling
from matpo.errors import UserError
from protocols.records import Tokens
from protocols.weights import Weights, weights_digest

TORCH_TYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SWITCH_INTERVAL_S = 0.0005
"""Every torch call gives up the interpreter and must win it back from the event loop; at Python's default of 5 ms each
side waits long for the other (measured: a third fewer episodes per second)."""
SWAP_DEADLINE_S = 60.0
"""A decoding step that lasts longer counts as a dead engine."""


class EmbeddedEngine:
    """Implements `actors.engines.engine.Engine` for one Llama, Qwen2 or Qwen3 model on this machine."""

    def __init__(
        self,
        architecture: Architecture,
        settings: Settings,
        worker: Worker,
        merge: Callable[[Weights], Weights] | None = None,
    ) -> None:
        """`merge` turns what is loaded, adapters, into whole weights."""
        self._architecture = architecture
        self._merge = merge
        self._settings = settings
        self._worker = worker
        self._version = -1
        self._digests: dict[int, str] = {}

    @classmethod
    @asynccontextmanager
    async def open(
        cls, folder: Path, settings: Settings, *, lora: Lora | None = None, player: str | None = "", seed: int
    ) -> AsyncIterator[Self]:
        """Read the architecture from `folder` and start the thread; weights come with the first `load`.

        With `lora` they are all its adapters', and every load adds `player`, one of `lora.players`, into a copy of the
        model's own.
        Raises `UserError` for a model this engine cannot run or a device torch does not have.
        """
        architecture = read_architecture(folder, context=settings.max_context_tokens)
        ends = read_end_tokens(folder, architecture)
        merge = None if lora is None else _merging(folder, lora, player)
        torch.set_num_threads(settings.threads)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        worker = _worker(architecture, settings, ends=ends, seed=seed)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, worker.run, name="embedded engine")
            try:
                yield cls(architecture, settings, worker, merge)
            finally:
                worker.mail.put(Stop())

    @property
    def version(self) -> int:
        """Version of the weights in use; -1 before the first `load`."""
        return self._version

    @property
    def digests(self) -> Mapping[int, str]:
        """Digests of all weights so far, read back from the device."""
        return self._digests

    async def generate(
        self, tokens: Tokens, sampling: Sampling, *, deadline_s: float, group: str = "", adapter: str | None = ""
    ) -> Generation:
        """Sample a continuation; see `Engine.generate`. Also raises `ValueError` for a prompt that fills the context.

        A caller that is cancelled or too late frees its row at the next decoding step.
        """
        check_prompt(tokens, vocabulary=self._architecture.vocab_size, context=self._settings.max_context_tokens)
        answered = anyio.Event()
        request = Request(prompt=tokens, sampling=sampling, answered=answered.set)
        self._worker.mail.put(Submit(request))
        try:
            with anyio.move_on_after(deadline_s):
                await answered.wait()
        finally:
            if not answered.is_set():
                self._worker.mail.put(Abandon(request))
        if request.failure:
            raise EngineFailure(f"the embedded engine failed: {request.failure}")
        if request.result is None:
            raise EngineFailure(
                f"no answer of the embedded engine within {deadline_s:g} s ({self._worker.running} running,"
                f" {self._worker.waiting} waiting); lower actor.concurrency or raise actor.generate_timeout_s"
            )
        return request.result

    async def load(self, weights: Weights, *, version: int, file: Path | None = None) -> LoadReport:
        """Build the new parameters beside the old ones while generation goes on, then swap between two steps.

        Raises `ValueError` when the tensors do not fit the model, `EngineFailure` when the device has no room for both;
        the old weights then stay.
        """
        try:
            parameters = await anyio.to_thread.run_sync(self._build, weights)
        except (RuntimeError, MemoryError) as error:
            raise EngineFailure(
                f"the embedded engine took no weights of version {version}: {reason_of(error)}"
            ) from error
        self._digests[version] = parameters.digest
        answered = anyio.Event()
        swap = Swap(parameters, version, answered.set)
        self._worker.mail.put(swap)
        with anyio.move_on_after(SWAP_DEADLINE_S) as waiting:
            await answered.wait()
        if waiting.cancelled_caught:
            raise EngineFailure(f"the embedded engine took no weights within {SWAP_DEADLINE_S:g} s")
        self._version = version
        return LoadReport(version=version, digest=parameters.digest, pause_s=swap.pause_s)

    async def health(self) -> EngineHealth:
        """Counters of the worker thread; `starting` until the first weights are in, `failed` after a failed round until
        one succeeds."""
        worker = self._worker
        name = f"embedded {self._architecture.model_type} on {self._settings.device}, version {self.version}"
        return EngineHealth(
            state="failed" if worker.failure else "starting" if self.version < 0 else "ready",
            detail=worker.failure or name,
            running=worker.running,
            waiting=worker.waiting,
            sampled_tokens=worker.sampled_tokens,
            prompt_tokens=worker.prompt_tokens,
            cached_tokens=worker.cached_tokens,
        )

    def _build(self, weights: Weights) -> Parameters:
        device, dtype = torch.device(self._settings.device), TORCH_TYPES[self._settings.dtype]
        whole = weights if self._merge is None else self._merge(weights)
        parameters = load_parameters(self._architecture, whole, device=device, dtype=dtype)
        # An adapter cannot be read back out of the sum: its digest is that of what was received.
        return parameters if self._merge is None else replace(parameters, digest=weights_digest(weights))


def _merging(folder: Path, lora: Lora, player: str | None) -> Callable[[Weights], Weights]:
    """Adds a player's adapter into a copy of the folder's weights. Raises `UserError` where the model lacks the
    projections."""
    base = read_model_weights(folder)
    shapes: Mapping[str, Shape] = {name: tensor.data.shape for name, tensor in base.items()}
    wanted = adapter_shapes(shapes, lora)

    def merge(weights: Weights) -> Weights:
        check_shapes(weights, wanted)
        return base if player is None else merged(base, only(weights, player), lora.model_copy(update={"roles": {}}))

    return merge


def _worker(architecture: Architecture, settings: Settings, *, ends: tuple[int, ...], seed: int) -> Worker:
    """The worker with its memory. Raises `UserError` for a device that is not there or too small."""
    try:
        torch.empty(0, device=settings.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"actor.engine.device {settings.device!r} cannot be used: {reason_of(error)}") from error
    post = asyncio.get_running_loop().call_soon_threadsafe
    try:
        return Worker(architecture, settings, ends=ends, seed=seed, post=post)
    except (RuntimeError, MemoryError) as error:
        raise UserError(
            f"actor.engine.max_batch = {settings.max_batch} sequences of max_context_tokens ="
            f" {settings.max_context_tokens} do not fit on {settings.device!r}"
            f" ({reason_of(error)}); lower one of them"
        ) from error
