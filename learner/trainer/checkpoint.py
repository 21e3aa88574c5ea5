"""Checkpoints of a run: written beside the others and renamed, checked by digest when read, the newest sound one wins.

A checkpoint folder is also a Hugging Face model folder, or with `model.lora` a PEFT one, so its weights can be
evaluated or trained further as they are.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import orjson
import structlog
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from learner.trainer.model import Policy
from learner.trainer.publish import parameters_digest
from matpo.adapters import CONFIG_FILE, TENSOR_FILE, peft_config, read_adapter
from matpo.errors import UserError
from matpo.model_files import TOKENIZER_FILES
from protocols.records import Record
from protocols.weights import file_digest

MODEL: Final = "model.safetensors"
OPTIMIZER: Final = "optimizer.safetensors"
MANIFEST: Final = "manifest.json"

log = structlog.get_logger()


class TrainerState(Record):
    """What a trainer must know beside its tensors to go on as if it had never stopped."""

    step: int
    """Steps taken; the learning-rate schedule is a function of it, and the journal's position: trees trained later go
    back to pending."""
    lineage: int
    """The lineage that wrote the checkpoint."""
    weights: str
    """Digest of the float32 weights (see `protocols.weights`)."""


class _Manifest(Record):
    state: TrainerState
    files: dict[str, str]
    """xxh3-128 of each file."""


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoint folders of one run."""

    folder: Path
    keep: int

    def save(self, policy: Policy, optimizer: torch.optim.Optimizer, *, step: int, lineage: int, model: Path) -> Path:
        """Write `step-<step>` and remove all but the newest `keep`; the tokenizer is copied from the folder `model`."""
        final = self.folder / f"step-{step:06d}"
        draft = self.folder / f".{final.name}.{os.getpid()}"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        parameters = {name: p.detach().cpu().contiguous() for name, p in policy.parameters.items()}
        save_file(parameters, draft / _file_of(policy), metadata={"format": "pt"})
        save_file(_optimizer_tensors(policy, optimizer), draft / OPTIMIZER)
        if policy.adapter is None:
            policy.model.config.save_pretrained(draft)
        else:
            (draft / CONFIG_FILE).write_bytes(peft_config(policy.adapter.lora, base=model.resolve()))
        for name in TOKENIZER_FILES:
            if (model / name).is_file():
                shutil.copyfile(model / name, draft / name)
        state = TrainerState(step=step, lineage=lineage, weights=parameters_digest(policy.parameters, "float32"))
        files = {path.name: file_digest(path) for path in sorted(draft.iterdir())}
        manifest = _Manifest(state=state, files=files)
        (draft / MANIFEST).write_bytes(orjson.dumps(manifest.model_dump(mode="json"), option=orjson.OPT_INDENT_2))
        for path in (*draft.iterdir(), draft):
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)
        draft.rename(final)
        _flush(self.folder)
        for old in self._newest_first()[self.keep :]:
            shutil.rmtree(old)
        return final

    def newest(self) -> TrainerState | None:
        """State of the newest sound checkpoint, without loading it."""
        for path in self._newest_first():
            manifest = _check(path)
            if manifest is not None:
                return manifest.state
        return None

    def oldest_step(self) -> int:
        """Step of the oldest checkpoint kept; 0 as long as a damaged one would leave none."""
        kept = self._newest_first()
        return int(kept[-1].name.removeprefix("step-")) if len(kept) > 1 else 0

    def restore(self, policy: Policy, optimizer: torch.optim.Optimizer, *, oldest: bool = False) -> TrainerState | None:
        """Load the newest (or the oldest) sound checkpoint into policy and optimizer; None if there is none.

        A damaged one is logged and the one before (or after) it taken.
        """
        for path in reversed(self._newest_first()) if oldest else self._newest_first():
            manifest = _check(path)
            if manifest is None:
                continue
            _require_same_kind(path, policy)
            weights = load_file(path / _file_of(policy))
            if weights.keys() != policy.parameters.keys():
                log.warning("checkpoint of another model ignored", checkpoint=str(path))
                continue
            with torch.no_grad():
                for name, parameter in policy.parameters.items():
                    parameter.copy_(weights[name])
            _restore_optimizer(policy, optimizer, load_file(path / OPTIMIZER))
            return manifest.state
        return None

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), reverse=True) if self.folder.is_dir() else []


def _file_of(policy: Policy) -> str:
    return MODEL if policy.adapter is None else TENSOR_FILE


def _require_same_kind(path: Path, policy: Policy) -> None:
    """Raise `UserError` for a checkpoint of all weights where an adapter is trained, of another adapter, or of any
    adapter where all weights are trained."""
    is_adapter = (path / CONFIG_FILE).is_file()
    if policy.adapter is not None and is_adapter:
        read_adapter(path, policy.adapter.lora)
    elif policy.adapter is not None:
        raise UserError(f"checkpoint {str(path)!r} holds all weights; remove model.lora or start a new run")
    elif is_adapter:
        raise UserError(f"checkpoint {str(path)!r} holds an adapter; set model.lora as it was or start a new run")


def _check(path: Path) -> _Manifest | None:
    """The manifest, if every file is there and unharmed."""
    try:
        manifest = _Manifest.model_validate_json((path / MANIFEST).read_bytes())
        damaged = [name for name, digest in manifest.files.items() if file_digest(path / name) != digest]
    except (OSError, ValidationError, SafetensorError) as error:
        log.warning("damaged checkpoint ignored", checkpoint=str(path), reason=str(error).splitlines()[0])
        return None
    if damaged:
        log.warning("damaged checkpoint ignored", checkpoint=str(path), reason=f"digest of {damaged} differs")
        return None
    return manifest


def _optimizer_tensors(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Optimizer state and random state as named tensors."""
    tensors = {"rng": torch.get_rng_state()}
    for name, parameter in policy.parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value.detach().cpu().contiguous()
    return tensors


def _restore_optimizer(policy: Policy, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(tensors.pop("rng"))
    optimizer.state.clear()
    for full, value in tensors.items():
        key, name = full.split(".", 1)
        parameter = policy.parameters[name]
        # AdamW counts steps on the host unless fused on a GPU, where it follows the parameter.
        optimizer.state[parameter][key] = value.to(parameter.device)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
