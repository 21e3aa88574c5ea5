"""Real planner/worker trees for the learner's benchmarks: those of a run with SmolLM2, recorded when none is given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import torch

from benchmarks.runs import ROOT, run_matpo
from learner.hub.journal import Journal
from learner.trainer.costs import TOKENS_ALONE
from learner.trainer.intake import prepare
from learner.trainer.plan import Sample
from learner.trainer.replay import trained_batches
from matpo.config import Config
from matpo.errors import UserError
from matpo.folder import RunFolder
from matpo.load import load_config
from protocols.records import version_of

CONFIG: Final = ROOT / "configs" / "smollm2.toml"
MODEL: Final = ROOT / ".cache" / "smollm2"
RECORD_LIMIT_S: Final = 900.0
SHORT: Final = ["run.steps=1", "evaluation.questions=0", "learner.group_size=8"]
"""One step: 2 tasks, 8 trees of each."""


@contextmanager
def recorded_run(given: Path | None) -> Iterator[RunFolder]:
    """The run folder given, or one that plays and trains the first step of configs/smollm2.toml and then goes away."""
    if given is not None:
        yield RunFolder.existing(given)
        return
    if not (MODEL / "config.json").is_file():
        raise UserError(f"{MODEL} is missing; run make smollm2")
    with TemporaryDirectory() as parent:
        yield RunFolder(run_matpo(CONFIG, SHORT, Path(parent), limit_s=RECORD_LIMIT_S))


def recorded_samples(folder: RunFolder) -> tuple[Config, tuple[Sample, ...]]:
    """The settings of a run and the samples of its first step, as its trainer saw them."""
    config = load_config(folder.config)
    with Journal.open_read_only(folder.journal) as journal, journal.snapshot():
        _, trees = next(trained_batches(journal))
    vocabulary = max(int(trajectory.tokens.max()) for tree in trees for trajectory in tree.trajectories) + 1
    shape = replace(TOKENS_ALONE, vocabulary=vocabulary)
    current = version_of(lineage=0, step=0)
    return config, prepare(trees, config, current=current, shape=shape, device=torch.device("cpu")).samples
