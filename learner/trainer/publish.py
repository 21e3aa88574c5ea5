"""Weights of a step as files in RUN/weights and the message that tells the hub about them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from protocols.delta import write_delta
from protocols.messages import Publish, WeightObject
from protocols.records import step_of
from protocols.weights import Tensor, WeightDtype, Weights, weights_digest, write_keyframe


def to_weights(parameters: Mapping[str, torch.nn.Parameter], dtype: WeightDtype) -> Weights:
    """Copy parameters to host memory as named tensors of `dtype`, rounded to nearest even."""
    return {name: _to_tensor(parameter.detach(), dtype) for name, parameter in parameters.items()}


def _to_tensor(value: torch.Tensor, dtype: WeightDtype) -> Tensor:
    if dtype == "float32":
        return Tensor("float32", np.ascontiguousarray(value.float().cpu().numpy()).copy())
    bits = value.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy()
    return Tensor("bfloat16", bits.view(np.uint16).copy())


class Publisher:
    """Writes a keyframe every so many versions, and between them what changed since the last version and the keyframe.

    A publisher starts with a keyframe, so the files of one trainer process never build on those of another.
    """

    def __init__(self, folder: Path, *, dtype: WeightDtype, keyframe_every: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._dtype = dtype
        self._keyframe_every = keyframe_every
        self._keyframe: tuple[int, Weights] | None = None
        self._last: tuple[int, Weights] | None = None
        self._moving_slowly = True
        """False once changes were no smaller than the weights, until the next scheduled keyframe."""

    def publish(self, parameters: Mapping[str, torch.nn.Parameter], *, version: int) -> Publish:
        """Write the objects of `version` (durably, before anyone hears of them) and return the announcement."""
        weights = to_weights(parameters, self._dtype)
        objects = self._objects(weights, version)
        if objects[0].kind == "keyframe":
            self._keyframe = version, weights
        self._last = version, weights
        return Publish(version=version, digest=weights_digest(weights), objects=objects)

    def _objects(self, weights: Weights, version: int) -> tuple[WeightObject, ...]:
        scheduled = step_of(version) % self._keyframe_every == 0
        self._moving_slowly |= scheduled
        if self._keyframe is None or self._last is None or scheduled or not self._moving_slowly:
            return (self._whole(weights, version),)
        base, before = self._last
        delta = self._change("delta", before, weights, base=base, version=version)
        start, keyframe = self._keyframe
        smaller: tuple[WeightObject, ...] = (delta,)
        if start != base:
            smaller = (delta, self._change("fold", keyframe, weights, base=start, version=version))
        # A change as large as the weights helps nobody: early in training at high rates most of bf16 moves.
        whole_bytes = sum(tensor.data.nbytes for tensor in weights.values())
        if max(item.size_bytes for item in smaller) < whole_bytes // 2:
            return smaller
        self._moving_slowly = False
        for item in smaller:
            (self._folder / item.name).unlink()
        return (self._whole(weights, version),)

    def _whole(self, weights: Weights, version: int) -> WeightObject:
        return write_keyframe(self._folder / f"keyframe-{version:010d}.safetensors", weights, version=version)

    def _change(
        self, kind: Literal["delta", "fold"], before: Weights, weights: Weights, *, base: int, version: int
    ) -> WeightObject:
        path = self._folder / f"{kind}-{base:010d}-{version:010d}.ulp"
        return write_delta(path, before, weights, base_version=base, version=version, kind=kind)
