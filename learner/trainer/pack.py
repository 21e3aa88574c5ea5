"""Turn the samples of a micro-batch into tensors without padding: a trie of inputs and the tokens to score on it.

N: trie tokens, K: distinct scored tokens, T: sampled tokens of the sequences (several may share one scored token).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from learner.trainer.attention.plan import AttentionPlan, plan_attention
from learner.trainer.costs import TOKENS_ALONE, ModelShape, Work, packed_work, padded_work
from learner.trainer.plan import Sample, plan
from learner.trainer.trie import build_trie


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
    adapter: str
    """Which of several adapters all of it is played by."""
    trajectory_T: Tensor
    """Which of the micro-batch's trajectories each sampled token belongs to."""
    computed: Work
    """What it takes."""
    packed: Work
    """What it would take with nothing shared: the sequences side by side, without padding."""
    padded: Work
    """What it would take with nothing shared and every sequence padded to the longest of its eight."""


def pack(
    samples: Sequence[Sample],
    *,
    limit_tokens: int,
    device: torch.device,
    shape: ModelShape = TOKENS_ALONE,
    ranks: int = 1,
    rank: int = 0,
) -> tuple[MicroBatch, ...]:
    """The micro-batches of one of `ranks` processes that share the step (see `plan`), those of one adapter together."""
    batches: list[MicroBatch] = []
    for adapter in sorted({sample.adapter for sample in samples}):
        alike = [sample for sample in samples if sample.adapter == adapter]
        planned = plan(alike, limit_tokens=limit_tokens, shape=shape, ranks=ranks)
        batches += [micro_batch(together, device, adapter) for together in planned[rank]]
    return tuple(batches)


def micro_batch(samples: Sequence[Sample], device: torch.device, adapter: str = "") -> MicroBatch:
    """Merge samples into a trie on `device`. Without any it holds one token that is not scored: a rank that has
    nothing to do takes part in the others' forward and backward pass all the same."""
    inputs = [sample.inputs for sample in samples] or [np.zeros(1, np.int32)]
    trie = build_trie(inputs)
    roles = tuple(sorted({sample.role for sample in samples}))
    of_role = [roles.index(sample.role) for sample in samples]
    temperatures = sorted({sample.temperature for sample in samples})
    places = [np.flatnonzero(sample.sampled) for sample in samples]
    counts = [len(place) for place in places]
    none = np.empty(0, np.int64)
    keys = np.stack(
        [
            np.concatenate([none, *(path[place - 1] for path, place in zip(trie.paths, places, strict=False))]),
            np.concatenate([none, *(sample.tokens[place] for sample, place in zip(samples, places, strict=True))]),
            np.repeat(np.array([temperatures.index(sample.temperature) for sample in samples], np.int64), counts),
        ]
    )
    scored_KX, scored_T = np.unique(keys, axis=1, return_inverse=True)
    order_T = np.argsort(scored_T, kind="stable")

    behaviour = np.concatenate([np.empty(0, np.float32), *(sample.behaviour for sample in samples)])

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
        behaviour_T=torch.from_numpy(behaviour[order_T]).to(device),
        advantage_T=per_token([sample.advantage for sample in samples]),
        weight_T=per_token([sample.weight for sample in samples]),
        role_T=torch.from_numpy(np.repeat(np.array(of_role, np.int64), counts)[order_T]).to(device),
        roles=roles,
        adapter=adapter,
        trajectory_T=torch.from_numpy(np.repeat(np.arange(len(samples)), counts)[order_T]).to(device),
        computed=Work(len(trie.tokens), int(trie.positions.sum()) + len(trie.tokens), len(scored_KX[0])),
        packed=packed_work(map(len, inputs), len(scored_T)),
        padded=padded_work(np.array([len(tokens) for tokens in inputs]), len(scored_T)),
    )
