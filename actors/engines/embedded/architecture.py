"""Which decoder a Hugging Face folder holds: its sizes, tensor shapes and end tokens, read without loading it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import orjson
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from matpo.errors import UserError

Shape = tuple[int, ...]
REMEDY = (
    "the embedded engine runs llama, qwen2 and qwen3 decoders that attend to everything, with plain rotary embeddings,"
    ' no experts and no quantised weights; for others set actor.engine.kind = "sglang"'
)


class _Rope(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    rope_type: Literal["default"] = Field(default="default", validation_alias=AliasChoices("rope_type", "type"))
    rope_theta: float | None = None


class _EndTokens(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    eos_token_id: int | list[int] | None = None


class Architecture(BaseModel):
    """The fields of config.json that decide the forward pass of Llama, Qwen2 and Qwen3."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model_type: Literal["llama", "qwen2", "qwen3"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int | None = None
    hidden_act: Literal["silu"] = "silu"
    rms_norm_eps: float
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: Literal[False] = False
    use_sliding_window: Literal[False] = False
    layer_types: tuple[Literal["full_attention"], ...] | None = None
    quantization_config: None = None
    max_position_embeddings: int | None = None
    rope_theta: float | None = None
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None
    eos_token_id: int | list[int] | None = None

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def heads_per_key(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def projection_bias(self) -> bool:
        """Whether the query, key and value projections add a bias."""
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def head_norm(self) -> bool:
        """Whether queries and keys are normalised per head (Qwen3)."""
        return self.model_type == "qwen3"

    @property
    def rotary_base(self) -> float:
        """θ of the rotary position embedding, wherever this version of the file keeps it."""
        inner = self.rope_parameters.rope_theta if self.rope_parameters else None
        return inner or self.rope_theta or 10_000.0

    def shapes(self) -> dict[str, Shape]:
        """Hugging Face parameter name → shape, of every tensor a set of weights must hold."""
        hidden, size = self.hidden_size, self.head_size
        queries, keys = self.num_attention_heads * size, self.num_key_value_heads * size
        layer: dict[str, Shape] = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (queries, hidden),
            "self_attn.k_proj.weight": (keys, hidden),
            "self_attn.v_proj.weight": (keys, hidden),
            "self_attn.o_proj.weight": (hidden, queries),
            "mlp.gate_proj.weight": (self.intermediate_size, hidden),
            "mlp.up_proj.weight": (self.intermediate_size, hidden),
            "mlp.down_proj.weight": (hidden, self.intermediate_size),
        }
        if self.projection_bias:
            layer |= {f"self_attn.{p}_proj.bias": (n,) for p, n in (("q", queries), ("k", keys), ("v", keys))}
        if self.attention_bias:
            layer["self_attn.o_proj.bias"] = (hidden,)
        if self.head_norm:
            layer |= {"self_attn.q_norm.weight": (size,), "self_attn.k_norm.weight": (size,)}
        shapes: dict[str, Shape] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for index in range(self.num_hidden_layers):
            shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes


def read_architecture(folder: Path, *, context: int = 0) -> Architecture:
    """Parse `folder/config.json`. Raises `UserError` for a model the embedded engine cannot run, or not with sequences
    of `context` tokens."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"model folder {str(folder)!r} holds no config.json; give a Hugging Face model folder")
    try:
        architecture = Architecture.model_validate(orjson.loads(file.read_bytes()))
    except orjson.JSONDecodeError as error:
        raise UserError(f"{file} is no JSON: {error}; give a Hugging Face model folder") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        value = "" if problem["type"] == "missing" else f" = {problem['input']!r}"
        raise UserError(f"{file}: {where}{value}: {problem['msg']}; {REMEDY}") from error
    known = architecture.max_position_embeddings
    if known is not None and context > known:
        raise UserError(
            f"actor.engine.max_context_tokens = {context}, but {str(folder)!r} has only {known} positions; lower it"
        )
    return architecture


def read_end_tokens(folder: Path, architecture: Architecture) -> tuple[int, ...]:
    """Tokens that end a turn: `eos_token_id` of generation_config.json, else of config.json."""
    file = folder / "generation_config.json"
    ends = _EndTokens.model_validate_json(file.read_bytes()).eos_token_id if file.is_file() else None
    chosen = architecture.eos_token_id if ends is None else ends
    if chosen is None:
        return ()
    return (chosen,) if isinstance(chosen, int) else tuple(chosen)
