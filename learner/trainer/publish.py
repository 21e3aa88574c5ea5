"""Weights of a step as files in RUN/weights and the message that tells the hub about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from protocols.delta import PART_ELEMENTS, DeltaWriter, EncodedPart, Encoder
from protocols.messages import Publish, WeightObject
from protocols.parts import Part, bits, cut, identities, in_order, slices
from protocols.records import step_of
from protocols.ulp import Bits
from protocols.weights import (
    Tensor,
    TensorIdentity,
    WeightDtype,
    Weights,
    combined_digest,
    read_keyframe,
    tensor_identity,
    write_keyframe,
)

Parameters = Mapping[str, torch.Tensor]
"""Name → tensor. Each is asked for once and let go of before the next, so that a mapping may compute it when asked."""


def to_weights(parameters: Parameters, dtype: WeightDtype) -> dict[str, Tensor]:
    """Copy parameters to host memory as named tensors of `dtype`, rounded to nearest even."""
    return {name: to_tensor(parameter, dtype) for name, parameter in parameters.items()}


def parameters_digest(parameters: Parameters, dtype: WeightDtype) -> str:
    """`weights_digest` of what `to_weights` gives, with one tensor of it in memory at a time."""
    return combined_digest(tensor_identity(name, to_tensor(value, dtype)) for name, value in parameters.items())


def to_tensor(parameter: torch.Tensor, dtype: WeightDtype) -> Tensor:
    """A copy in host memory, rounded to nearest even."""
    return Tensor(dtype, _rounded(parameter.detach().reshape(-1), dtype).reshape(parameter.shape))


def _rounded(values: torch.Tensor, dtype: WeightDtype) -> NDArray[np.float32] | NDArray[np.uint16]:
    """A copy in host memory of its own; bfloat16 as bit patterns."""
    if dtype == "float32":
        floats = np.empty(values.shape, np.float32)
        torch.from_numpy(floats).copy_(values)
        return floats
    patterns = np.empty(values.shape, np.uint16)
    torch.from_numpy(patterns.view(np.int16)).view(torch.bfloat16).copy_(values)
    return patterns


@dataclass(frozen=True, slots=True)
class _Held:
    """Weights of a version."""

    version: int
    digest: str
    tensors: tuple[TensorIdentity, ...]
    weights: Weights


@dataclass(frozen=True, slots=True)
class _Change:
    """A difference that is being written."""

    kind: Literal["delta", "fold"]
    base: _Held
    writer: DeltaWriter

    def finish(self, current: _Held) -> WeightObject:
        return self.writer.finish(
            current.tensors,
            kind=self.kind,
            base_version=self.base.version,
            base_digest=self.base.digest,
            version=current.version,
        )


class Publisher:
    """Writes a keyframe every so many versions, and between them what changed since the last version and the keyframe.

    A publisher starts with a keyframe, so the files of one trainer process never build on those of another. Of the
    weights it keeps one copy, the last version's, brought up to date part by part while the parts are compared; the
    keyframe is read from its file.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: WeightDtype,
        keyframe_every: int,
        threads: int = 1,
        part_elements: int = PART_ELEMENTS,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._dtype = dtype
        self._keyframe_every = keyframe_every
        self._threads = threads
        self._part_elements = part_elements
        self._keyframe: _Held | None = None
        self._last: _Held | None = None
        self._moving_slowly = True
        """False once changes were no smaller than the weights, until the next scheduled keyframe."""

    def publish(self, parameters: Parameters, *, version: int) -> Publish:
        """Write the objects of `version` (durably, before anyone hears of them) and return the announcement."""
        scheduled = step_of(version) % self._keyframe_every == 0
        self._moving_slowly |= scheduled
        last, keyframe = self._last, self._keyframe
        if last is None or keyframe is None:
            return self._whole(self._held(version, to_weights(parameters, self._dtype)))
        self._last = None  # between two versions until this is done: after an error there is nothing to build on
        bases: list[tuple[Literal["delta", "fold"], _Held]] = []
        if not scheduled and self._moving_slowly:
            bases = [("delta", last)] if keyframe.version == last.version else [("delta", last), ("fold", keyframe)]
        with ExitStack() as drafts:
            changes = [
                _Change(kind, base, drafts.enter_context(self._writer(kind, base, version))) for kind, base in bases
            ]
            self._advance(last.weights, parameters, changes)
            current = self._held(version, last.weights)
            if not changes or not self._moving_slowly:
                return self._whole(current)
            objects = tuple(change.finish(current) for change in changes)
        self._last = current
        return Publish(version=version, digest=current.digest, objects=objects)

    def _advance(self, weights: Weights, parameters: Parameters, changes: Sequence[_Change]) -> None:
        """Bring our copy up to the parameters, and write what changes, as long as it is small."""
        encoder = Encoder(weights, self._part_elements)
        large_bytes = sum(tensor.data.nbytes for tensor in weights.values()) // 2

        def compare(work: tuple[Part, list[Bits]]) -> list[EncodedPart]:
            part, fresh = work
            compared = changes if self._moving_slowly else ()
            encoded = [encoder.encode(slices(change.base.weights, part), fresh) for change in compared]
            for old, new in zip(slices(weights, part), fresh, strict=True):
                old[:] = new
            return encoded

        for encoded in in_order(compare, self._fresh(weights, parameters), self._threads):
            for change, part in zip(changes, encoded, strict=False):
                change.writer.add(part)
            # A change as large as the weights helps nobody: early in training at high rates most of bf16 moves.
            if any(change.writer.size_bytes >= large_bytes for change in changes):
                self._moving_slowly = False

    def _fresh(self, weights: Weights, parameters: Parameters) -> Iterator[tuple[Part, list[Bits]]]:
        held, flat = "", torch.empty(0)
        for part in cut(weights, self._part_elements):
            fresh: list[Bits] = []
            for name, start, stop in part:
                if name != held:
                    held, flat = name, parameters[name].detach().reshape(-1)
                fresh.append(bits(Tensor(self._dtype, _rounded(flat[start:stop], self._dtype))))
            yield part, fresh

    def _held(self, version: int, weights: Weights) -> _Held:
        known = tuple(identities(weights, self._threads))
        return _Held(version, combined_digest(known), known, weights)

    def _whole(self, current: _Held) -> Publish:
        path = self._folder / f"keyframe-{current.version:010d}.safetensors"
        written = write_keyframe(path, current.weights, version=current.version, digest=current.digest)
        self._keyframe = replace(current, weights=read_keyframe(path))
        self._last = current
        return Publish(version=current.version, digest=current.digest, objects=(written,))

    def _writer(self, kind: str, base: _Held, version: int) -> DeltaWriter:
        path = self._folder / f"{kind}-{base.version:010d}-{version:010d}.ulp"
        return DeltaWriter(path, self._part_elements)
