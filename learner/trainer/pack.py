"""Turn the sequences of a step into micro-batches without padding: a trie of inputs and the tokens to score on it.

N: trie tokens, K: distinct scored tokens, T: sampled tokens of the sequences (several may share one scored token).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from learner.trainer.attention import AttentionPlan, plan_attention
from learner.trainer.trie import build_trie, lexicographic
from protocols.records import Flags, Floats, Tokens


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

    def __post_init__(self) -> None:
        if not self.sampled[1:].any() or self.sampled[0]:
            raise ValueError(
                f"a {self.role} trajectory of {len(self.tokens)} tokens must sample some, and not its first"
            )

    @property
    def inputs(self) -> Tokens:
        """The tokens the model must read: all before the last sampled one."""
        return self.tokens[: int(np.flatnonzero(self.sampled)[-1])]


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """What one forward and backward pass computes. Sampled tokens are sorted by the scored token they share."""

    tokens_N: Tensor
    positions_N: Tensor
    plan: AttentionPlan
    predictor_K: Tensor
    """Place in the trie of the token before each scored token."""
    target_K: Tensor
    temperature_K: Tensor
    scored_T: Tensor
    """Which scored token each sampled token is; ascending."""
    behaviour_T: Tensor
    advantage_T: Tensor
    weight_T: Tensor
    role_T: Tensor
    """Index into `roles`."""
    roles: tuple[str, ...]
    input_tokens: int
    """Tokens of the sequences before merging."""


def pack(samples: Sequence[Sample], *, limit_tokens: int, device: torch.device) -> tuple[MicroBatch, ...]:
    """Micro-batches of at most `limit_tokens` trie tokens (a longer sequence gets one of its own).

    Sequences that share prefixes come together, so little is computed twice across micro-batches.
    """
    inputs = [sample.inputs for sample in samples]
    order, shared = lexicographic(inputs)
    groups: list[list[int]] = []
    used = 0
    for place, index in enumerate(order):
        fresh = len(inputs[index]) - shared[place]
        if not groups or used + fresh > limit_tokens:
            groups.append([])
            used, fresh = 0, len(inputs[index])
        groups[-1].append(index)
        used += fresh
    return tuple(_micro_batch([samples[index] for index in group], device) for group in groups)


def _micro_batch(samples: Sequence[Sample], device: torch.device) -> MicroBatch:
    inputs = [sample.inputs for sample in samples]
    trie = build_trie(inputs)
    roles = tuple(sorted({sample.role for sample in samples}))
    temperatures = sorted({sample.temperature for sample in samples})
    places = [np.flatnonzero(sample.sampled) for sample in samples]
    counts = [len(place) for place in places]
    keys = np.stack(
        [
            np.concatenate([path[place - 1] for path, place in zip(trie.paths, places, strict=True)]),
            np.concatenate([sample.tokens[place] for sample, place in zip(samples, places, strict=True)]),
            np.repeat([temperatures.index(sample.temperature) for sample in samples], counts),
        ]
    )
    scored_KX, scored_T = np.unique(keys, axis=1, return_inverse=True)
    order_T = np.argsort(scored_T, kind="stable")

    def per_token(values: list[float]) -> Tensor:
        return torch.from_numpy(np.repeat(np.array(values, np.float32), counts)[order_T]).to(device)

    return MicroBatch(
        tokens_N=torch.from_numpy(trie.tokens).to(device),
        positions_N=torch.from_numpy(trie.positions).to(device),
        plan=plan_attention(trie, device),
        predictor_K=torch.from_numpy(scored_KX[0].copy()).to(device),
        target_K=torch.from_numpy(scored_KX[1].copy()).to(device),
        temperature_K=torch.tensor(temperatures, dtype=torch.float32)[torch.from_numpy(scored_KX[2])].to(device),
        scored_T=torch.from_numpy(scored_T[order_T].copy()).to(device),
        behaviour_T=torch.from_numpy(np.concatenate([sample.behaviour for sample in samples])[order_T]).to(device),
        advantage_T=per_token([sample.advantage for sample in samples]),
        weight_T=per_token([sample.weight for sample in samples]),
        role_T=torch.from_numpy(np.repeat([roles.index(sample.role) for sample in samples], counts)[order_T]).to(
            device
        ),
        roles=roles,
        input_tokens=sum(len(tokens) for tokens in inputs),
    )
