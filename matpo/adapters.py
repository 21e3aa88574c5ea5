"""Low-rank adapters as they travel: PEFT's tensor names, the shapes they must have, and PEFT's description of them.

An adapter of rank r adds (alpha / r) · B A to a projection's weight W [out, in]; A is [r, in] and B is [out, r]
(arXiv 2106.09685). What is published of a run with `model.lora` is the A and B of every targeted projection, or the
merged weights. Tensors of a role's own adapter are named ROLE/ and then as those of the shared one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from matpo.config import Lora
from matpo.errors import UserError
from matpo.explain import explain
from protocols.weights import BadWeights, Tensor, Weights, read_keyframe

Shape = tuple[int, ...]
PEFT_PREFIX = "base_model.model."
CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"


class _PeftConfig(BaseModel):
    """The part of adapter_config.json that must agree with `model.lora`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    r: int
    lora_alpha: float
    target_modules: tuple[str, ...]
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    modules_to_save: tuple[str, ...] | None = None


def targeted(shapes: Mapping[str, Shape], lora: Lora) -> list[str]:
    """Names of the base model's weights [out, in] that the adapter changes.

    Raises `UserError` naming target modules the model does not have.
    """
    found = {name: name.removesuffix(".weight").rsplit(".", 1)[-1] for name in shapes if name.endswith("_proj.weight")}
    missing = sorted(set(lora.target_modules) - set(found.values()))
    if missing:
        raise UserError(f"model.lora.target_modules names {missing}, which the model does not have; remove them")
    return [name for name, module in found.items() if module in lora.target_modules]


def prefix_of(adapter: str) -> str:
    """Of the names of an adapter's tensors; `adapter` as in `Lora.adapters`."""
    return f"{adapter}/" if adapter else ""


def factor_names(weight: str, adapter: str = "") -> tuple[str, str]:
    """Names of an adapter's A and B that belong to a weight of the base model."""
    stem = prefix_of(adapter) + PEFT_PREFIX + weight.removesuffix(".weight")
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def adapter_shapes(shapes: Mapping[str, Shape], lora: Lora) -> dict[str, Shape]:
    """Tensor name → shape, of every tensor all adapters together must hold; `shapes` are the base model's."""
    wanted: dict[str, Shape] = {}
    for adapter in lora.adapters:
        for name in targeted(shapes, lora):
            first, second = factor_names(name, adapter)
            rows, columns = shapes[name]
            wanted |= {first: (lora.rank, columns), second: (rows, lora.rank)}
    return wanted


def only(weights: Weights, adapter: str) -> Weights:
    """The tensors of one adapter among those of several, under the names they have when it is alone."""
    start = prefix_of(adapter) + PEFT_PREFIX
    return {name.removeprefix(prefix_of(adapter)): value for name, value in weights.items() if name.startswith(start)}


def merged(base: Weights, adapter: Weights, lora: Lora) -> Weights:
    """All weights with the only adapter there is added in; changed tensors are new and float32, the others are shared.

    Raises `ValueError` naming the first tensor of the adapter that is missing, unknown or of another shape.
    """
    shapes: Mapping[str, Shape] = {name: tensor.data.shape for name, tensor in base.items()}
    check_shapes(adapter, adapter_shapes(shapes, lora))
    changed: dict[str, Tensor] = {}
    for name in targeted(shapes, lora):
        first, second = (_floats(adapter[factor]) for factor in factor_names(name))
        change = np.matmul(second, first)
        change *= lora.alpha / lora.rank
        changed[name] = Tensor("float32", np.add(_floats(base[name]), change, out=change))
    return {**base, **changed}


def _floats(tensor: Tensor) -> NDArray[np.float32]:
    """float32, not copied where it is that already."""
    if tensor.dtype == "float32":
        return tensor.data.astype(np.float32, copy=False)
    return (tensor.data.astype(np.uint32) << 16).view(np.float32)


def check_shapes(weights: Weights, shapes: Mapping[str, Shape]) -> None:
    """Raise `ValueError` naming tensors that are missing, unknown or of another shape."""
    missing, unknown = sorted(set(shapes) - set(weights)), sorted(set(weights) - set(shapes))
    if missing or unknown:
        raise ValueError(f"weights do not fit the model: missing {missing[:3]}, unknown {unknown[:3]}")
    for name, shape in shapes.items():
        found = weights[name].data.shape
        if found != shape:
            raise ValueError(f"weights do not fit the model: {name} is {found}, expected {shape}")


def peft_config(lora: Lora, *, base: Path) -> bytes:
    """adapter_config.json."""
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(lora.target_modules),
        "inference_mode": True,
    }
    return orjson.dumps(content, option=orjson.OPT_INDENT_2)


def read_adapter(folder: Path, lora: Lora) -> Weights:
    """The tensors of a PEFT folder, memory-mapped. Raises `UserError` where it is no adapter as `model.lora` says."""
    config, tensors = folder / CONFIG_FILE, folder / TENSOR_FILE
    for file in (config, tensors):
        if not file.is_file():
            raise UserError(f"adapter folder {str(folder)!r} holds no {file.name}; give a folder that PEFT saved")
    try:
        found = _PeftConfig.model_validate_json(config.read_bytes())
        weights = read_keyframe(tensors)
    except ValidationError as error:
        raise UserError(f"{config}: {explain(error, _PeftConfig)}; give a folder that PEFT saved") from error
    except BadWeights as error:
        raise UserError(str(error)) from error
    if found.use_rslora or found.use_dora or found.bias != "none" or found.modules_to_save:
        raise UserError(f"{config} asks for more than A and B (rslora, dora, bias or modules_to_save): not supported")
    have = (found.r, found.lora_alpha, sorted(found.target_modules))
    want = (lora.rank, lora.alpha, sorted(lora.target_modules))
    if have != want:
        raise UserError(f"{config} has (rank, alpha, target_modules) {have}, model.lora has {want}; make them agree")
    return weights
