"""Gradient checkpointing where activations would not fit: layers keep only their inputs and are computed once more in
the backward pass, with the same result bit for bit, for a third more arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from learner.trainer.memory import available_bytes
from matpo.errors import UserError

MEMORY_FRACTION = 0.8
"""Of the free memory that activations may take; the rest is for one layer's gradients and a chunk of logits."""

Mode = Literal["auto", "always", "never"]


@dataclass(slots=True)
class Recompute:
    """Whether the layers of one model are recomputed, decided per micro-batch."""

    mode: Mode
    device: torch.device
    layers: int = 0
    """That can be; without any the model always keeps its activations."""
    bytes_per_token: int = 0
    """Kept for the backward pass (`saved_bytes`)."""
    on: bool = field(default=False, init=False)
    """For the forward pass that comes next."""

    @classmethod
    def of(cls, body: torch.nn.Module, mode: Mode, device: torch.device) -> Recompute:
        """Make every layer of `body` heed the switch this returns.

        Hugging Face's own switch acts only in training mode, which would bring dropout back. Raises `UserError` where
        `always` asks for the impossible.
        """
        switch = cls(mode, device)
        for layer in body.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.forward = partial(switch._forward, layer.forward)
                switch.layers += 1
        if mode == "always" and not switch.layers:
            raise UserError(
                f"model {type(body).__name__} has no layers that can be recomputed;"
                ' set learner.gradient_checkpointing = "never"'
            )
        return switch

    def needed(self, tokens: int) -> bool:
        """Whether a micro-batch of so many distinct tokens must be recomputed: `auto` asks whether
        tokens · bytes per token exceed `MEMORY_FRACTION` of what is free now."""
        if self.mode == "auto":
            return self.layers > 0 and tokens * self.bytes_per_token > MEMORY_FRACTION * available_bytes(self.device)
        return self.mode == "always"

    def _forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # a layer's own signature
        if not self.on:
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def saved_bytes(forward: Callable[[], Tensor], model: torch.nn.Module) -> int:
    """What a forward pass keeps for its backward pass beside the model's own parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result
    return sum(kept.values())
