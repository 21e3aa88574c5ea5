"""What every engine promises: tokens in, sampled tokens out, weights swapped underneath."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from matpo.config import Sampling
from protocols.records import Floats, StopReason, Tokens
from protocols.weights import Weights


class EngineFailure(Exception):
    """The engine could not answer (dead, hung, shutting down). The episode ends as `engine_failure` or is retried."""


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """What one request sampled; the three arrays have equal length.

    `stop` is `stop` (an end token, included in `tokens`), `length` (max_tokens reached) or `context` (the key/value
    slots are full).
    """

    tokens: Tokens
    logprobs: Floats
    """log μ of each token after temperature, top-k and top-p, float32."""
    versions: Tokens
    """Version of the weights that sampled each token."""
    stop: StopReason

    def __post_init__(self) -> None:
        if not len(self.tokens) == len(self.logprobs) == len(self.versions):
            lengths = f"{len(self.tokens)} tokens, {len(self.logprobs)} logprobs and {len(self.versions)} versions"
            raise ValueError(f"generation has {lengths}")


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a weight swap cost and what the engine now holds."""

    version: int
    digest: str
    """Computed by the engine from the tensors it loaded."""
    pause_s: float


@dataclass(frozen=True, slots=True)
class EngineHealth:
    state: Literal["ready", "starting", "failed"]
    detail: str
    running: int
    """Requests being decoded."""
    waiting: int
    sampled_tokens: int
    """Since the engine started."""
    prompt_tokens: int = 0
    """Of all requests since the engine started."""
    cached_tokens: int = 0
    """How many of the prompt tokens needed no computing: their keys and values were still there."""
    silent: tuple[str, ...] = ()
    """Servers that do not answer, or are being started again."""


class Engine(Protocol):
    """Generates and follows weights. `generate` may be called from many tasks at once."""

    @property
    def version(self) -> int:
        """Version of the weights in use; -1 before the first `load`."""
        ...

    @property
    def digests(self) -> Mapping[int, str]:
        """Version → digest, as `protocols.weights.weights_digest` computes it, of all weights that ever sampled."""
        ...

    async def generate(
        self, tokens: Tokens, sampling: Sampling, *, deadline_s: float, group: str = "", adapter: str | None = ""
    ) -> Generation:
        """Sample a continuation of `tokens`. Requests of one `group` share prefixes: an engine may keep them together.
        Of several adapters `adapter` names the one to sample with (`Lora.adapters`), or None: the model as it started.

        Raises `ValueError` for a token outside the vocabulary or an empty prompt, `EngineFailure` if the engine dies
        or `deadline_s` passes. A weight swap in between is invisible but for `versions`.
        """
        ...

    async def load(self, weights: Weights, *, version: int, file: Path | None = None) -> LoadReport:
        """Swap in new weights between two decoding steps; running requests continue from their tokens.

        `file`: the safetensors file `weights` are mapped from, if there is one; it stays as it is until the next load.
        """
        ...

    async def health(self) -> EngineHealth: ...


def check_prompt(tokens: Tokens, *, vocabulary: int, context: int) -> None:
    """Raise `ValueError` for a prompt that would harm an engine, or leaves no room for an answer."""
    if not len(tokens):
        raise ValueError("the prompt is empty; give at least one token")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(f"token {low if low < 0 else high} is outside the vocabulary of {vocabulary}")
    if len(tokens) >= context:
        raise ValueError(
            f"the prompt has {len(tokens)} tokens, the engine's context {context}: nothing could be sampled; raise"
            " actor.engine.max_context_tokens or lower the roles' limits"
        )
