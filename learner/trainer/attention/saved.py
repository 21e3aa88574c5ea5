"""What our attention functions keep between their forward and their backward pass."""

from __future__ import annotations

from typing import Protocol, TypeVar

from torch import Tensor

Plan = TypeVar("Plan")


class Saved(Protocol[Plan]):
    """autograd's context as the forward pass leaves it; it takes constants as plain attributes."""

    saved_tensors: tuple[Tensor, ...]
    plan: Plan
    scale: float

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Tensors that become `saved_tensors`."""
