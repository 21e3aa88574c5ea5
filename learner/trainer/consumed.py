"""RUN/consumed.jsonl: the trainer's own record of what it trained on, which the hub's ledger can be checked against.

A line is on disk before the hub hears of its step. Lines are only ever appended:

    {"event": "start", "lineage": 1, "step": 20, "time": …}
        a trainer began at the weights of step 20; lines above this one with later steps are of weights that are gone
    {"event": "step", "lineage": 1, "step": 21, "trained": [tree, …], "filtered": [[tree, reason], …], "digest": "…",
     "time": …}
        the trees of step 21, and xxh3-128 of their bytes as they came from the hub, in their order
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import xxhash

from learner.trainer.intake import StepInput
from protocols.records import Record


class Started(Record):
    """A trainer began in a new lineage."""

    event: Literal["start"] = "start"
    lineage: int
    step: int
    time: float
    """Unix seconds."""


class StepConsumed(Record):
    """A step was taken."""

    event: Literal["step"] = "step"
    lineage: int
    step: int
    trained: tuple[str, ...]
    filtered: tuple[tuple[str, str], ...]
    digest: str
    time: float


class ConsumedLog:
    """Appends whole lines; one that a kill cut short was never reported to the hub and is removed."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        _cut_off_half_line(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def start(self, lineage: int, step: int) -> None:
        """The trainer begins at the weights of `step`."""
        self._append(Started(lineage=lineage, step=step, time=time.time()))

    def step(self, lineage: int, step: int, taken: StepInput, frames: Sequence[memoryview]) -> None:
        """Step `step` was taken with these trees; `frames` are the batch as it came."""
        digest = xxhash.xxh3_128()
        for frame in frames:
            digest.update(frame)
        self._append(
            StepConsumed(
                lineage=lineage,
                step=step,
                trained=taken.trained,
                filtered=taken.filtered,
                digest=digest.hexdigest(),
                time=time.time(),
            )
        )

    def _append(self, record: Record) -> None:
        line = record.model_dump_json().encode() + b"\n"
        if os.write(self._descriptor, line) != len(line):
            raise OSError(f"the disk took only part of a line of {len(line)} bytes of consumed.jsonl; free disk space")
        os.fsync(self._descriptor)


def _cut_off_half_line(descriptor: int) -> None:
    end = os.fstat(descriptor).st_size
    at = end
    while at:
        start = max(0, at - 2**16)
        newline = os.pread(descriptor, at - start, start).rfind(b"\n")
        if newline >= 0:
            at = start + newline + 1
            break
        at = start
    if at < end:
        os.ftruncate(descriptor, at)
