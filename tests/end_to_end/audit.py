"""Every sampled token of a finished run, checked against the weights it says it was sampled with."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from learner.hub.batches import split_frames
from learner.hub.journal import Journal, integer, text
from learner.trainer.lora import Adapter
from learner.trainer.publish import to_weights
from matpo.adapters import TENSOR_FILE
from matpo.folder import RunFolder
from matpo.load import load_config
from protocols.codec import decode_tree
from protocols.records import EpisodeTree, Flags, Floats, Trajectory, step_of
from protocols.weights import weights_digest

KEEP_ALL = ["learner.checkpoint_every_steps=1", "learner.keep_checkpoints=1000", "learner.publish_dtype=float32"]
"""Overrides of a run that can be audited: its checkpoints hold every version that was published."""


@dataclass(frozen=True, slots=True)
class Audit:
    """What was found. Tokens of greedy episodes are not counted: their log-probabilities are those at temperature 0."""

    tokens: int
    worst: float
    """Largest difference between a recorded log μ and that of the version's weights, recomputed by transformers."""
    swapped: int
    """Tokens sampled after a swap within their own turn."""
    worst_swapped: float
    """As `worst`, of those tokens alone: an engine that keeps keys and values at a swap samples them from a mixture."""
    mixed: int
    """Trajectories with tokens of several versions."""
    versions: tuple[int, ...]
    """Published versions that sampled a token."""


def audit(run: Path) -> Audit:
    """Recompute every training token. Fails on a version that was not published, or published with other weights."""
    folder = RunFolder(run)
    with Journal.open_read_only(folder.journal) as journal:
        rows = journal.rows("SELECT version, digest FROM publications")
        published = {integer(row[0]): text(row[1]) for row in rows}
        rows = journal.rows("SELECT sizes, data FROM trees JOIN frames ON tree_seq = seq WHERE state != 'evaluation'")
        trees = [decode_tree(split_frames(row)) for row in rows]
    parts = [part for tree in trees for part in tree.trajectories if part.sampled.any()]
    seen = sorted({int(version) for part in parts for version in part.versions})
    _check_stamps(trees, published)
    differences = [np.zeros(int(part.sampled.sum()), dtype=np.float32) for part in parts]
    for version in seen:
        model, adapter = _model_of(folder, step_of(version))
        weights = dict(model.named_parameters()) if adapter is None else adapter.published
        held = weights_digest(to_weights(weights, "float32"))
        assert held == published[version], f"version {version} was published with other weights than its checkpoint's"
        for part, into in zip(parts, differences, strict=True):
            with _played(adapter, part.role):
                _compare(model, part, version, into)
    found = np.concatenate(differences)
    swapped = np.concatenate([_after_swap(part) for part in parts])
    return Audit(
        tokens=len(found),
        worst=float(found[~swapped].max()),
        swapped=int(swapped.sum()),
        worst_swapped=float(found[swapped].max(initial=0)),
        mixed=sum(len(set(part.versions.tolist())) > 1 for part in parts),
        versions=tuple(seen),
    )


def _check_stamps(trees: list[EpisodeTree], published: dict[int, str]) -> None:
    for tree in trees:
        stamps = {stamp.version: stamp.digest for stamp in tree.weights}
        assert set(stamps) == set(tree.versions), f"tree {tree.tree_id} names other versions than its tokens"
        assert stamps.items() <= published.items(), f"tree {tree.tree_id} was sampled with unknown weights {stamps}"


def _model_of(folder: RunFolder, step: int) -> tuple[PreTrainedModel, Adapter | None]:
    """The model a step led to, and the adapters in it if it is those that were trained."""
    config = load_config(folder.config)
    path = folder.checkpoints / f"step-{step:06d}"
    lora = config.model.lora
    source = path if step and lora is None else config.model.path
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, local_files_only=True)
    if lora is None:
        return model, None
    adapter = Adapter.attach(model, lora, seed=config.run.seed)
    if step:
        with torch.no_grad():
            for name, tensor in load_file(path / TENSOR_FILE).items():
                adapter.parameters[name].copy_(tensor)
    return model, adapter


def _played(adapter: Adapter | None, role: str) -> AbstractContextManager[None]:
    """The model as it plays a role."""
    if adapter is None:
        return nullcontext()
    name = adapter.lora.adapter_of(role)
    if name is None:
        return adapter.disabled()
    adapter.play(name)
    return nullcontext()


def _compare(model: PreTrainedModel, part: Trajectory, version: int, into: Floats) -> None:
    """Fill in |recorded - recomputed| of the trajectory's tokens of one version."""
    chosen = part.versions == version
    places = np.flatnonzero(part.sampled)[chosen]
    if not len(places):
        return
    with torch.no_grad():
        logits = model(torch.from_numpy(part.tokens.astype(np.int64))[None]).logits[0]
    logp = torch.log_softmax(logits.float(), dim=-1).numpy()
    into[chosen] = np.abs(logp[places - 1, part.tokens[places]] - part.logprobs[chosen])


def _after_swap(part: Trajectory) -> Flags:
    """Which sampled tokens have another version than the first of their turn."""
    versions = np.full(len(part.tokens), -1)
    versions[part.sampled] = part.versions
    first = versions.copy()
    for turn in part.turns:
        if turn.kind == "sampled":
            first[turn.start : turn.stop] = versions[turn.start]
    return np.asarray((versions != first)[part.sampled])
