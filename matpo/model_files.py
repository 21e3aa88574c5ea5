"""What both sides know of a model without loading it: where its files are and which tokenizer it has."""

from __future__ import annotations

import hashlib
from pathlib import Path

import orjson
from pydantic import JsonValue

from matpo.config import Model
from matpo.errors import UserError
from protocols.weights import BadWeights, OtherFormat, read_keyframe

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def model_folder(model: Model) -> Path:
    """The model's folder, checked to hold a Hugging Face model."""
    path = model.path.expanduser()
    if not (path / "config.json").is_file():
        raise UserError(
            f"model.path {str(path)!r} holds no config.json; give the folder of a Hugging Face model"
            " (models/quickstart ships with matpo, `make smollm2` prepares SmolLM2)"
        )
    return path


def require_model_files(model: Model) -> None:
    """Check that everything a run reads from the model's folder is there, before any process starts."""
    folder = model_folder(model)
    _require_object(folder / "config.json", "model_type")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"model.path {str(folder)!r} holds no .safetensors file; give a folder with weights")
    for file in weights:
        try:
            read_keyframe(file)  # only its header
        except OtherFormat:
            continue  # the trainer converts it
        except BadWeights as error:
            raise UserError(f"{error} (copy it there again)") from error
    tokenizer_digest(model)
    _require_object(folder / TOKENIZER_FILES[0], "model")


def _require_object(file: Path, key: str) -> None:
    """Raise `UserError` for what is no JSON object with this key."""
    try:
        content: JsonValue = orjson.loads(file.read_bytes())
    except orjson.JSONDecodeError as error:
        raise UserError(f"{str(file)!r} is not JSON ({error.msg}); copy it there again") from error
    if not isinstance(content, dict) or key not in content:
        raise UserError(f"{str(file)!r} has no {key!r}; copy it there again")


def chat_template(model: Model) -> str | None:
    """The text of the chat template that replaces the tokenizer's own, if one is configured."""
    if model.chat_template is None:
        return None
    if not model.chat_template.is_file():
        raise UserError(f"model.chat_template {str(model.chat_template)!r} is no file; give a jinja file")
    return model.chat_template.read_text(encoding="utf-8")


def tokenizer_digest(model: Model) -> str:
    """Digest of everything that turns text into tokens; actor and learner must agree on it."""
    folder = model_folder(model)
    if not (folder / TOKENIZER_FILES[0]).is_file():
        raise UserError(
            f"model.path {str(folder)!r} holds no {TOKENIZER_FILES[0]}; copy the tokenizer's files beside the weights"
        )
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        file = folder / name
        digest.update(name.encode() + b"\0" + (file.read_bytes() if file.is_file() else b"") + b"\0")
    digest.update((chat_template(model) or "").encode())
    return digest.hexdigest()[:16]
