"""What must be known of a Hugging Face folder to drive a server with it: vocabulary, end tokens, tensor shapes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from matpo.adapters import Shape, check_shapes
from matpo.errors import UserError
from protocols.weights import BadWeights, Weights, read_keyframe

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


class _Text(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    vocab_size: int | None = None
    tie_word_embeddings: bool = False
    eos_token_id: int | list[int] | None = None
    num_key_value_heads: int | None = None


class _Config(_Text):
    text_config: _Text | None = None


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Read from a folder without loading the model."""

    folder: Path
    vocabulary: int
    """Rows of the embedding: a token id at or beyond it kills the server."""
    ends: tuple[int, ...]
    tied: bool
    key_heads: int
    """Heads of keys and values; 1 where the folder does not say."""
    shapes: dict[str, Shape]
    """Tensor name → shape, of every tensor a set of weights must hold."""

    def check(self, weights: Weights) -> None:
        """Raise `ValueError` where the tensors do not fit: the server would ignore them silently."""
        check_shapes(weights, self.shapes)


def read_facts(folder: Path) -> ModelFacts:
    """Parse config.json, generation_config.json and the headers of the weight files. Raises `UserError`."""
    config = _read(folder / "config.json")
    text = config.text_config or config
    if text.vocab_size is None:
        raise UserError(f"{folder / 'config.json'} has no vocab_size; give the folder of a Hugging Face language model")
    defaults = folder / "generation_config.json"
    own = _read(defaults).eos_token_id if defaults.is_file() else None
    ends = own if own is not None else config.eos_token_id if config.eos_token_id is not None else text.eos_token_id
    tied = config.tie_word_embeddings or text.tie_word_embeddings
    shapes: dict[str, Shape] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            shapes |= {name: tensor.data.shape for name, tensor in read_keyframe(file).items()}
        except BadWeights as error:
            raise UserError(str(error)) from error
    if not shapes:
        raise UserError(f"model folder {str(folder)!r} holds no .safetensors file; give a Hugging Face model folder")
    if tied:
        shapes.pop(HEAD, None)
    return ModelFacts(
        folder=folder,
        vocabulary=text.vocab_size,
        ends=() if ends is None else (ends,) if isinstance(ends, int) else tuple(ends),
        tied=tied,
        key_heads=text.num_key_value_heads or 1,
        shapes=shapes,
    )


def _read(file: Path) -> _Config:
    if not file.is_file():
        raise UserError(f"model folder {str(file.parent)!r} holds no {file.name}; give a Hugging Face model folder")
    try:
        return _Config.model_validate(orjson.loads(file.read_bytes()))
    except (orjson.JSONDecodeError, ValidationError) as error:
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
