"""Weights as the decoder uses them: projections fused, on the device, and readable back for attestation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from actors.engines.embedded.architecture import Architecture
from matpo.adapters import check_shapes
from protocols.weights import Tensor, WeightDtype, Weights, weights_digest


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One decoder block. Fused rows: queries, keys, values; gate, up."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    head_norm: torch.Tensor | None
    """[query heads + key heads, head size]: the query norm for each query head, the key norm for each key head."""
    output: torch.Tensor
    output_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Parameters:
    """One set of weights on the device."""

    embedding: torch.Tensor
    layers: tuple[Layer, ...]
    norm: torch.Tensor
    head: torch.Tensor
    digest: str
    """Of the published weights, computed from the tensors above (see `load_parameters`)."""


def load_parameters(
    architecture: Architecture, weights: Weights, *, device: torch.device, dtype: torch.dtype
) -> Parameters:
    """Copy `weights` to the device, fused.

    The digest is computed from what was loaded, read back from the device in the published type. Only where float32
    weights were rounded to a bfloat16 engine can that not be undone; then it is the digest of what was received.
    Raises `ValueError` naming the first tensor that is missing, unknown or of another shape.
    """
    shapes = architecture.shapes()
    check_shapes(weights, shapes)
    loaded = {name: to_torch(weights[name]).to(device=device, dtype=dtype) for name in shapes}
    layers = tuple(_fuse(architecture, loaded, index) for index in range(architecture.num_hidden_layers))
    embedding = loaded["model.embed_tokens.weight"]
    head = embedding if architecture.tie_word_embeddings else loaded["lm_head.weight"]
    norm = loaded["model.norm.weight"]
    whole = {"model.embed_tokens.weight": embedding, "model.norm.weight": norm}
    if not architecture.tie_word_embeddings:
        whole["lm_head.weight"] = head
    for index, layer in enumerate(layers):
        whole |= _split(architecture, layer, index)
    rounded = dtype == torch.bfloat16 and any(tensor.dtype == "float32" for tensor in weights.values())
    held = weights if rounded else {name: _to_tensor(whole[name], weights[name].dtype) for name in shapes}
    return Parameters(embedding, layers, norm, head, weights_digest(held))


def to_torch(tensor: Tensor) -> torch.Tensor:
    """On the CPU, in the tensor's own type."""
    # A copy: the received bytes may be read-only, and torch must not share them.
    copied = torch.from_numpy(np.array(tensor.data))
    return copied.view(torch.bfloat16) if tensor.dtype == "bfloat16" else copied


def _to_tensor(value: torch.Tensor, dtype: WeightDtype) -> Tensor:
    if dtype == "bfloat16":
        return Tensor(dtype, value.to(torch.bfloat16).cpu().contiguous().view(torch.uint16).numpy())
    return Tensor(dtype, value.float().cpu().contiguous().numpy())


def _fuse(architecture: Architecture, loaded: dict[str, torch.Tensor], index: int) -> Layer:
    part = f"model.layers.{index}."
    attention = part + "self_attn."
    head_norm = None
    if architecture.head_norm:
        queries = loaded[attention + "q_norm.weight"].expand(architecture.num_attention_heads, -1)
        keys = loaded[attention + "k_norm.weight"].expand(architecture.num_key_value_heads, -1)
        head_norm = torch.cat([queries, keys])
    return Layer(
        attention_norm=loaded[part + "input_layernorm.weight"],
        qkv=torch.cat([loaded[f"{attention}{p}_proj.weight"] for p in "qkv"]),
        qkv_bias=torch.cat([loaded[f"{attention}{p}_proj.bias"] for p in "qkv"])
        if architecture.projection_bias
        else None,
        head_norm=head_norm,
        output=loaded[attention + "o_proj.weight"],
        output_bias=loaded[attention + "o_proj.bias"] if architecture.attention_bias else None,
        mlp_norm=loaded[part + "post_attention_layernorm.weight"],
        gate_up=torch.cat([loaded[part + "mlp.gate_proj.weight"], loaded[part + "mlp.up_proj.weight"]]),
        down=loaded[part + "mlp.down_proj.weight"],
    )


def _split(architecture: Architecture, layer: Layer, index: int) -> dict[str, torch.Tensor]:
    """The tensors of a fused layer under their Hugging Face names."""
    part = f"model.layers.{index}."
    attention = part + "self_attn."
    keys = architecture.num_key_value_heads * architecture.head_size
    sizes = [architecture.num_attention_heads * architecture.head_size, keys, keys]
    named = {
        part + "input_layernorm.weight": layer.attention_norm,
        part + "post_attention_layernorm.weight": layer.mlp_norm,
        attention + "o_proj.weight": layer.output,
        part + "mlp.down_proj.weight": layer.down,
    }
    named |= {f"{attention}{p}_proj.weight": t for p, t in zip("qkv", torch.split(layer.qkv, sizes), strict=True)}
    if layer.qkv_bias is not None:
        named |= {
            f"{attention}{p}_proj.bias": t for p, t in zip("qkv", torch.split(layer.qkv_bias, sizes), strict=True)
        }
    if layer.output_bias is not None:
        named[attention + "o_proj.bias"] = layer.output_bias
    if layer.head_norm is not None:
        named[attention + "q_norm.weight"] = layer.head_norm[0]
        named[attention + "k_norm.weight"] = layer.head_norm[-1]
    gate, up = layer.gate_up.chunk(2)
    return named | {part + "mlp.gate_proj.weight": gate, part + "mlp.up_proj.weight": up}
