"""Low-rank adapters in training: peft's layers in a frozen model, A and B in float32 under the names they travel by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from matpo.adapters import PEFT_PREFIX, adapter_shapes, factor_names, targeted
from matpo.config import Lora
from matpo.errors import UserError

NAME = "matpo"
"""peft's name of the one adapter a model has."""


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """What `model.lora` adds to a model, which is frozen otherwise."""

    lora: Lora
    model: PreTrainedModel
    parameters: dict[str, torch.nn.Parameter]
    """A and B of every adapted projection, under PEFT's names."""
    base: dict[str, torch.nn.Parameter]
    """The model's own, under their Hugging Face names."""

    @classmethod
    def attach(cls, model: PreTrainedModel, lora: Lora, *, seed: int) -> Self:
        """Put the adapter into a float32 model and freeze the rest. B starts at 0, so nothing changes; A is drawn from
        `seed` alone. Raises `UserError` for projections the model does not have as linear layers.
        """
        shapes = adapter_shapes({name: tuple(p.shape) for name, p in model.named_parameters()}, lora)
        wanted = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft only divides it
            target_modules=list(lora.target_modules),
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):  # peft draws on the CPU, wherever the model is
            torch.manual_seed(seed)
            inject_adapter_in_model(wanted, model, adapter_name=NAME)
        adapter = cls.of(model, lora)
        if {name: tuple(p.shape) for name, p in adapter.parameters.items()} != shapes:
            raise UserError(
                f"model {type(model).__name__} does not hold {list(lora.target_modules)} as linear layers;"
                " change model.lora.target_modules or remove model.lora"
            )
        return adapter

    @classmethod
    def of(cls, model: PreTrainedModel, lora: Lora) -> Self:
        """The adapter a model has already."""
        parameters: dict[str, torch.nn.Parameter] = {}
        base: dict[str, torch.nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            if f".{NAME}." in name:
                parameters[PEFT_PREFIX + name.replace(f".{NAME}.", ".")] = parameter
            else:
                base[name.replace(".base_layer.", ".")] = parameter
        return cls(lora, model, parameters, base)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model without the adapter: the reference it started from."""
        layers = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    @property
    def published(self) -> Mapping[str, Tensor]:
        """What travels to the engines, by name."""
        return self.parameters if self.lora.publish == "adapter" else Merged(self.base, self.parameters, self.lora)


class Merged(Mapping[str, Tensor]):
    """All weights with the adapter added in; the changed ones are computed each time they are asked for."""

    def __init__(self, base: Mapping[str, Tensor], factors: Mapping[str, Tensor], lora: Lora) -> None:
        self._base = base
        self._factors = factors
        self._scale = lora.alpha / lora.rank
        self._changed = frozenset(targeted({name: tuple(tensor.shape) for name, tensor in base.items()}, lora))

    def __getitem__(self, name: str) -> Tensor:
        weight = self._base[name].detach()
        if name not in self._changed:
            return weight
        first, second = (self._factors[factor].detach() for factor in factor_names(name))
        return weight.float() + (second @ first) * self._scale

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)
