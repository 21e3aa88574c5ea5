"""An adapter added into the weights it belongs to: W + (alpha / rank) · B A."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from actors.engines.embedded.parameters import to_torch
from actors.engines.folder import read_model_weights
from matpo.adapters import Shape, adapter_shapes, check_shapes, factor_names, targeted
from matpo.config import Lora
from protocols.weights import Tensor, Weights


@dataclass(frozen=True, slots=True, eq=False)
class Adapted:
    """A frozen model whose adapter changes."""

    base: Weights
    targets: tuple[str, ...]
    """Tensors of `base` that the adapter changes."""
    shapes: Mapping[str, Shape]
    """Of the adapter's tensors."""
    scale: float
    """alpha / rank."""

    @classmethod
    def of(cls, folder: Path, lora: Lora) -> Self:
        """The model of a Hugging Face folder. Raises `UserError` where it has no such weights or projections."""
        base = read_model_weights(folder)
        shapes: Mapping[str, Shape] = {name: tensor.data.shape for name, tensor in base.items()}
        return cls(base, tuple(targeted(shapes, lora)), adapter_shapes(shapes, lora), lora.alpha / lora.rank)

    def merged(self, adapter: Weights) -> Weights:
        """All weights with the adapter in them; changed tensors are new and float32, the others are shared.

        Raises `ValueError` naming the first tensor of the adapter that is missing, unknown or of another shape.
        """
        check_shapes(adapter, self.shapes)
        changed: dict[str, Tensor] = {}
        for name in self.targets:
            first, second = (to_torch(adapter[factor]).float() for factor in factor_names(name))
            whole = torch.addmm(to_torch(self.base[name]).float(), second, first, alpha=self.scale)
            changed[name] = Tensor("float32", whole.numpy())
        return {**self.base, **changed}
