"""Recognises the beginning of a collapse from the figures of a step, and remembers the rollbacks of a run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from matpo.collapse_config import Collapse
from matpo.config import Config
from protocols.records import Record

FIRST_STEPS: Final = 10
"""The median of so many steps is what is normal for a run."""


class Vitals(Record):
    """The figures of one step that are watched."""

    step: int
    mismatch_kl: float | None
    """Over all roles, as the others; None if nothing was trained."""
    entropy: float | None
    truncated: float
    """Share of trajectories cut short by a limit."""
    gradient_cosine: float | None
    signs: tuple[str, ...] = ()
    """Of a collapse, in words."""


class Alarm(Record):
    """Signs of a collapse, together and for long enough."""

    step: int
    since_step: int
    """First of the steps in a row that showed them."""
    signs: tuple[str, ...]
    """What is wrong, in words."""

    def __str__(self) -> str:
        return f"signs of a collapse since step {self.since_step}: {'; '.join(self.signs)}"


@dataclass(slots=True)
class CollapseWatch:
    """Looks at the steps of a run in order."""

    limits: Collapse
    _first: list[Vitals] = field(default_factory=list)
    _in_a_row: list[int] = field(default_factory=list)

    def see(self, now: Vitals) -> Alarm | None:
        """Take in a step; an alarm if it is the last of enough in a row. Then counting begins again."""
        signs = self.signs(now)
        if len(self._first) < FIRST_STEPS and now.entropy is not None:
            self._first.append(now)
        if self.limits.action == "off" or len(signs) < self.limits.signs:
            self._in_a_row = []
            return None
        self._in_a_row.append(now.step)
        if len(self._in_a_row) < self.limits.patience_steps:
            return None
        since, self._in_a_row = self._in_a_row[0], []
        return Alarm(step=now.step, since_step=since, signs=tuple(signs))

    def signs(self, now: Vitals) -> list[str]:
        """What is wrong with a step, in words."""
        limits, found = self.limits, []
        if now.mismatch_kl is not None and now.mismatch_kl > limits.mismatch_kl:
            found.append(f"mismatch KL {now.mismatch_kl:.3g} is above {limits.mismatch_kl:g} nats per token")
        if now.gradient_cosine is not None and now.gradient_cosine > limits.gradient_cosine:
            found.append(f"gradients keep pointing the same way (cosine {now.gradient_cosine:.2f})")
        if len(self._first) < FIRST_STEPS:
            return found
        normal = statistics.median(one.entropy for one in self._first if one.entropy is not None)
        lowest, highest = limits.entropy_share * normal, normal / limits.entropy_share
        if now.entropy is not None and not lowest <= now.entropy <= highest:
            found.append(f"entropy went from {normal:.3g} to {now.entropy:.3g} nats")
        cut = statistics.median(one.truncated for one in self._first)
        if now.truncated > cut + limits.truncated_rise:
            found.append(f"{now.truncated:.0%} of trajectories are cut short by a limit, {cut:.0%} were")
        return found


class Rollback(Record):
    """The run went back from a step to a checkpoint."""

    step: int
    to_step: int
    signs: tuple[str, ...]
    time: float
    """Unix seconds."""


def read_rollbacks(path: Path) -> tuple[Rollback, ...]:
    """The rollbacks of a run in order, from its RUN/rollbacks.jsonl."""
    if not path.is_file():
        return ()
    return tuple(Rollback.model_validate_json(line) for line in path.read_bytes().splitlines())


def append_rollback(path: Path, alarm: Alarm, *, to_step: int) -> None:
    """Remember a rollback."""
    line = Rollback(step=alarm.step, to_step=to_step, signs=alarm.signs, time=time.time()).model_dump_json()
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def rollbacks_before(rollbacks: Sequence[Rollback], step: int) -> int:
    """How many rollbacks came before the surviving step `step` was taken: the last of them is the last one that went
    back to an earlier step."""
    return max((number for number, one in enumerate(rollbacks, 1) if one.to_step < step), default=0)


def slowed(config: Config, rollbacks: int) -> Config:
    """The config with the learning rate that so many rollbacks leave."""
    learner = config.learner
    lr = learner.lr * learner.collapse.rollback_lr_factor**rollbacks
    return config.model_copy(update={"learner": learner.model_copy(update={"lr": lr})})


def watch_from(limits: Collapse, past: Iterable[Vitals]) -> CollapseWatch:
    """A watch that has seen the steps of the run so far, whatever alarm they gave."""
    watch = CollapseWatch(limits)
    for one in past:
        watch.see(one)
    return watch
