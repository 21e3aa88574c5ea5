"""Named tensors as they travel from the learner to the engines, and their identity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

WeightDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """One parameter. bfloat16 is held as its bit pattern in uint16, because numpy has no such type."""

    dtype: WeightDtype
    data: NDArray[np.float32] | NDArray[np.uint16]
    """C-contiguous, in the parameter's shape."""

    def __post_init__(self) -> None:
        expected = np.float32 if self.dtype == "float32" else np.uint16
        if self.data.dtype != expected or not self.data.flags.c_contiguous:
            raise ValueError(f"a {self.dtype} tensor must be C-contiguous {expected.__name__}, got {self.data.dtype}")


Weights = Mapping[str, Tensor]
"""Hugging Face parameter name → tensor. Tied parameters appear once."""


def tensor_digest(tensor: Tensor) -> str:
    """xxh3-128 of the tensor's bytes, in hex."""
    return xxhash.xxh3_128_hexdigest(tensor.data.reshape(-1).view(np.uint8).data)


def weights_digest(weights: Weights) -> str:
    """Identity of a whole set of weights: xxh3-128 over name, dtype, shape and digest of every tensor, by name."""
    whole = xxhash.xxh3_128()
    for name in sorted(weights):
        tensor = weights[name]
        whole.update(f"{name}|{tensor.dtype}|{tensor.data.shape}|{tensor_digest(tensor)}\n".encode())
    return whole.hexdigest()
