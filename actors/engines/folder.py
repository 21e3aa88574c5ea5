"""The weights of a Hugging Face folder, as the learner would send them."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from matpo.errors import UserError
from protocols.weights import BadWeights, Tensor, Weights, read_keyframe


class _Tie(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    tie_word_embeddings: bool = False


def read_model_weights(folder: Path) -> Weights:
    """All tensors of the folder's safetensors files, memory-mapped; a tied output head appears once.

    Raises `UserError` where there are none, or a file is damaged or of another number format.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"model folder {str(folder)!r} holds no .safetensors file; give a Hugging Face model folder")
    weights: dict[str, Tensor] = {}
    try:
        for file in files:
            weights |= read_keyframe(file)
    except BadWeights as error:
        raise UserError(str(error)) from error
    if _Tie.model_validate_json((folder / "config.json").read_bytes()).tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return weights
