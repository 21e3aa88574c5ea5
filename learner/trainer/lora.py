"""Low-rank adapters in training: peft's layers in a frozen model, A and B in float32 under the names they travel by."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from matpo.adapters import PEFT_PREFIX, adapter_shapes, factor_names, prefix_of, targeted
from matpo.config import Lora
from matpo.errors import UserError

SHARED = "matpo"
"""peft's name of the adapter that is not a role's own; those are named `OWN` and the role."""
OWN = "role_"
FACTOR = re.compile(r"(.*\.lora_[AB])\.([^.]+)\.weight")
"""A's or B's name in the model: stem and peft's name of the adapter."""


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """What `model.lora` adds to a model, which is frozen otherwise: one adapter, or several of which one plays."""

    lora: Lora
    model: PreTrainedModel
    parameters: dict[str, torch.nn.Parameter]
    """A and B of every adapted projection, under the names they travel by."""
    base: dict[str, torch.nn.Parameter]
    """The model's own, under their Hugging Face names."""

    @classmethod
    def attach(cls, model: PreTrainedModel, lora: Lora, *, seed: int) -> Self:
        """Put the adapters into a float32 model and freeze the rest. B starts at 0, so nothing changes; A is drawn from
        `seed` alone. Raises `UserError` for projections the model does not have as linear layers.
        """
        shapes = adapter_shapes({name: tuple(p.shape) for name, p in model.named_parameters()}, lora)
        wanted = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft only divides it
            target_modules=list(lora.target_modules),
            task_type="CAUSAL_LM",
        )
        # peft draws on the CPU, wherever the model is, and warns of several adapters, which is what is wanted here.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            torch.manual_seed(seed)
            for name in lora.adapters:
                inject_adapter_in_model(wanted, model, adapter_name=_peft_name(name))
        adapter = cls.of(model, lora)
        if {name: tuple(p.shape) for name, p in adapter.parameters.items()} != shapes:
            raise UserError(
                f"model {type(model).__name__} does not hold {list(lora.target_modules)} as linear layers;"
                " change model.lora.target_modules or remove model.lora"
            )
        return adapter

    @classmethod
    def of(cls, model: PreTrainedModel, lora: Lora) -> Self:
        """The adapters a model has already; the first one plays."""
        parameters: dict[str, torch.nn.Parameter] = {}
        base: dict[str, torch.nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            if factor := FACTOR.fullmatch(name):
                own = "" if factor[2] == SHARED else factor[2].removeprefix(OWN)
                parameters[f"{prefix_of(own)}{PEFT_PREFIX}{factor[1]}.weight"] = parameter
            else:
                base[name.replace(".base_layer.", ".")] = parameter
        adapter = cls(lora, model, parameters, base)
        adapter.play(lora.adapters[0])
        return adapter

    @property
    def silent(self) -> int:
        """Parameters of all adapters but the one that plays."""
        whole, count = sum(p.numel() for p in self.parameters.values()), len(self.lora.adapters)
        return whole * (count - 1) // count

    def play(self, name: str) -> None:
        """Let one of `lora.adapters` speak from now on, forward and backward."""
        for layer in self._layers():
            layer.set_adapter(_peft_name(name))
        for parameter in self.parameters.values():  # peft freezes the silent ones, whose gradients are to stay
            parameter.requires_grad_(True)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model without the adapter: the reference it started from."""
        for layer in self._layers():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers():
                layer.enable_adapters(True)
            self.play(self.lora.adapters[0])

    def _layers(self) -> list[LoraLayer]:
        return [module for module in self.model.modules() if isinstance(module, LoraLayer)]

    @property
    def published(self) -> Mapping[str, Tensor]:
        """What travels to the engines, by name."""
        return self.parameters if self.lora.publish == "adapter" else Merged(self.base, self.parameters, self.lora)


def _peft_name(adapter: str) -> str:
    return OWN + adapter if adapter else SHARED


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
