"""Checkpoints of a run: written beside the others and renamed, checked by digest when read, the newest sound one wins.

A checkpoint folder is also a Hugging Face model folder, or with `model.lora` a PEFT one, so its weights can be
evaluated or trained further as they are.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import orjson
import safetensors.torch
import structlog
import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError

from learner.trainer.model import Policy
from learner.trainer.publish import to_tensor
from learner.trainer.ranks import ALONE, Ranks
from learner.trainer.sharding import Whole, load
from learner.trainer.tensor_file import TensorFile, write_tensors
from matpo.adapters import CONFIG_FILE, TENSOR_FILE, only, peft_config, read_adapter
from matpo.config import Lora
from matpo.credit.scheme import NOTHING, Memory
from matpo.errors import NO_SPACE, UserError
from matpo.model_files import TOKENIZER_FILES
from protocols.records import Record
from protocols.weights import combined_digest, file_digest, read_keyframe, tensor_identity, write_keyframe

MODEL: Final = "model.safetensors"
OPTIMIZER: Final = "optimizer.safetensors"
MANIFEST: Final = "manifest.json"
RNG: Final = "rng"

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
    credit: dict[str, float] = Field(default={})
    """What the credit scheme remembers of the steps so far."""


class _Manifest(Record):
    state: TrainerState
    files: dict[str, str]
    """xxh3-128 of each file."""


class _Outline(Record):
    """What the first rank tells the others of the checkpoint that is loaded."""

    state: TrainerState
    moments: tuple[str, ...]
    """Tensors of the optimizer as large as their parameter."""


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoint folders of one run. Only the first rank reads and writes them, so the number of ranks may change.

    Saving and restoring are collective, tensor by tensor: no rank ever holds two whole ones.
    """

    folder: Path
    keep: int
    ranks: Ranks = ALONE

    def save(
        self,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        *,
        step: int,
        lineage: int,
        model: Path,
        memory: Memory = NOTHING,
        required: bool = True,
    ) -> bool:
        """Write `step-<step>` and remove all but it and the `keep - 1` before; the tokenizer is copied from `model`.

        `memory` is the credit scheme's. Where the disk has no room nothing changes: raises `UserError`, or logs it and
        returns False where the checkpoint is not `required`.
        """
        weights, moments = Whole(policy.parameters), Whole(_optimizer_tensors(policy, optimizer))
        if not self.ranks.first:
            weights.help()
            moments.help()
            return True
        draft = self.folder / ".draft"  # one name, so that what a killed trainer left is cleared by the next save
        try:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            digest = _write(draft, policy, weights, moments, step=step, model=model)
            _seal(draft, TrainerState(step=step, lineage=lineage, weights=digest, credit=dict(memory)))
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            if error.errno not in NO_SPACE:
                raise
            why = f"the checkpoint of step {step} has no room in {str(self.folder)!r} ({error.strerror})"
            remedy = "free some there, or lower learner.keep_checkpoints"
            if required or self.ranks.count > 1:  # the other ranks wait for tensors that were to follow
                raise UserError(f"{why}; {remedy}, then resume the run") from error
            log.error("checkpoint not written, training goes on", reason=why, remedy=remedy)
            return False
        final = self.folder / f"step-{step:06d}"
        shutil.rmtree(final, ignore_errors=True)
        draft.rename(final)
        _flush(self.folder)
        # Later ones were damaged when this run went on, and the ledger has gone back behind them: they are no use.
        self.forget_after(step)
        for old in self._newest_first()[self.keep :]:
            shutil.rmtree(old)
        return True

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
        return _step_of(kept[-1]) if len(kept) > 1 else 0

    def steps_before(self, step: int) -> list[int]:
        """Steps of the sound checkpoints older than `step`, newest first."""
        older = ((found, path) for path in self._newest_first() if (found := _step_of(path)) < step)
        return [found for found, path in older if _check(path) is not None]

    def forget_after(self, step: int) -> None:
        """Remove the checkpoints of later steps."""
        for path in self._newest_first():
            if _step_of(path) > step:
                shutil.rmtree(path)

    def restore(self, policy: Policy, optimizer: torch.optim.Optimizer, *, oldest: bool = False) -> TrainerState | None:
        """Load the newest (or the oldest) sound checkpoint into policy and optimizer; None if there is none.

        A damaged one is logged and the one before (or after) it taken.
        """
        with ExitStack() as files:
            found = self._open(policy, files, oldest=oldest) if self.ranks.first else None
            told = self.ranks.share(None if not self.ranks.first else [] if found is None else found.told())
            if not told:
                return None
            outline = _Outline.model_validate_json(bytes(told[0]))
            for name in sorted(policy.parameters):
                load(policy.parameters[name], name, None if found is None else found.weights.read)
            optimizer.state.clear()
            for full in outline.moments:
                parameter, key = _owner(policy, full)
                optimizer.state[parameter][key] = moment = torch.zeros_like(parameter.detach())
                load(moment, full, None if found is None else found.optimizer.read)
        small = safetensors.torch.load(bytes(told[1]))
        torch.set_rng_state(small.pop(RNG))
        for full, value in small.items():
            parameter, key = _owner(policy, full)
            # AdamW counts steps on the host unless fused on a GPU, where it follows the parameter.
            optimizer.state[parameter][key] = value.to(parameter.device)
        return outline.state

    def _open(self, policy: Policy, files: ExitStack, *, oldest: bool) -> _Found | None:
        """The checkpoint to restore, on the rank that reads it."""
        for path in reversed(self._newest_first()) if oldest else self._newest_first():
            manifest = _check(path)
            if manifest is None:
                continue
            _require_same_kind(path, policy)
            weights = files.enter_context(TensorFile.open(path / _file_of(policy)))
            if set(weights.names) == policy.parameters.keys():
                return _Found(manifest.state, weights, files.enter_context(TensorFile.open(path / OPTIMIZER)))
            log.warning("checkpoint of another model ignored", checkpoint=str(path))
        return None

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), reverse=True) if self.folder.is_dir() else []


def _write(draft: Path, policy: Policy, weights: Whole, moments: Whole, *, step: int, model: Path) -> str:
    """Everything but the manifest; returns the digest of the weights."""
    digest = combined_digest(
        tensor_identity(name, to_tensor(value, "float32"))
        for name, value in write_tensors(draft / _file_of(policy), weights)
    )
    deque(write_tensors(draft / OPTIMIZER, moments), maxlen=0)
    if policy.adapter is None:
        policy.model.config.save_pretrained(draft)
    else:
        write_adapters(draft, policy.adapter.lora, base=model.resolve(), step=step)
    for name in TOKENIZER_FILES:
        if (model / name).is_file():
            shutil.copyfile(model / name, draft / name)
    return digest


def _seal(draft: Path, state: TrainerState) -> None:
    """Write the manifest, and see that all is on the disk."""
    files = {path.name: file_digest(path) for path in sorted(draft.iterdir()) if path.is_file()}
    manifest = _Manifest(state=state, files=files)
    (draft / MANIFEST).write_bytes(orjson.dumps(manifest.model_dump(mode="json"), option=orjson.OPT_INDENT_2))
    for path in (*draft.rglob("*"), draft):
        _flush(path)


def write_adapters(folder: Path, lora: Lora, *, base: Path, step: int) -> None:
    """Describe the adapters in `folder` to PEFT: the shared one as it lies there, a role's own in a folder for it."""
    (folder / CONFIG_FILE).write_bytes(peft_config(lora, base=base))
    for role in lora.own:
        own = folder / role
        own.mkdir()
        (own / CONFIG_FILE).write_bytes(peft_config(lora, base=base))
        write_keyframe(own / TENSOR_FILE, only(read_keyframe(folder / TENSOR_FILE), role), version=step)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


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


@dataclass(frozen=True, slots=True)
class _Found:
    """A checkpoint whose files are open."""

    state: TrainerState
    weights: TensorFile
    optimizer: TensorFile

    def told(self) -> list[bytes]:
        """What every rank must know: the outline, and the tensors too small to be spread."""
        small = {name: self.optimizer.read(name) for name in self.optimizer.names if _is_small(name)}
        large = tuple(name for name in self.optimizer.names if name not in small)
        return [_Outline(state=self.state, moments=large).model_dump_json().encode(), safetensors.torch.save(small)]


def _is_small(name: str) -> bool:
    return name == RNG or name.startswith("step.")


def _optimizer_tensors(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Optimizer state and random state as named tensors."""
    tensors = {RNG: torch.get_rng_state()}
    for name, parameter in policy.parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value
    return tensors


def _owner(policy: Policy, full: str) -> tuple[torch.nn.Parameter, str]:
    """The parameter that a tensor of the optimizer belongs to, and what it is to it."""
    key, name = full.split(".", 1)
    return policy.parameters[name], key


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
