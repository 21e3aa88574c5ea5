"""Watches the figures of every step for a beginning collapse, and does what the config wants done about it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import structlog

from learner.trainer.checkpoint import Checkpoints
from learner.trainer.intake import IntakeReport
from learner.trainer.ranks import Ranks
from learner.trainer.report import StepReport
from matpo.collapse import Alarm, CollapseWatch, Vitals, append_rollback, read_rollbacks, slowed, watch_from
from matpo.config import Config
from matpo.errors import Paused
from matpo.folder import RunFolder
from matpo.metrics import read_metrics
from matpo.objective.report import merged_policy

log = structlog.get_logger()

MOST_ROLLBACKS = 3
"""To one checkpoint; then somebody must look."""
BEYOND_ANY_LIMIT = 1e9
"""Stands for figures that are not finite, which JSON has no number for."""


@dataclass(slots=True)
class Guard:
    """The collapse watch of one run: the first rank looks, and all do what it decides."""

    folder: RunFolder
    config: Config
    """With the learning rate that the run's rollbacks leave."""
    ranks: Ranks
    watch: CollapseWatch
    raised: bool = False
    """Whether this stretch of training must end here."""
    _alarm: Alarm | None = None

    @classmethod
    def of(cls, folder: RunFolder, config: Config, ranks: Ranks) -> Self:
        """A watch that knows the steps and rollbacks of the run so far."""
        limits = config.learner.collapse
        rollbacks = len(read_rollbacks(folder.rollbacks)) if ranks.first else 0
        past = past_vitals(folder.metrics) if ranks.first else ()
        return cls(folder, slowed(config, int(ranks.most([rollbacks])[0])), ranks, watch_from(limits, past))

    @property
    def goes_back(self) -> bool:
        """Whether what was trained last is to be forgotten."""
        return self.raised and self.config.learner.collapse.action == "rollback"

    def see(self, step: int, report: StepReport, intake: IntakeReport) -> Vitals:
        """Take in a step. On the first rank an alarm is logged; if it is to end training, `raised` is set on all."""
        now = vitals(step, report, intake)
        now = now.model_copy(update={"signs": tuple(self.watch.signs(now))})
        alarm = self.watch.see(now) if self.ranks.first else None
        if alarm is not None:
            log.warning("collapse", step=step, since_step=alarm.since_step, signs=alarm.signs)
        ends = self.config.learner.collapse.action in ("pause", "rollback") and step < self.config.run.steps
        if alarm is not None and ends:
            self._alarm = alarm
        self.raised = bool(self.ranks.most([self._alarm is not None])[0])
        return now

    def conclude(self, checkpoints: Checkpoints) -> bool:
        """After training ended: whether it is to begin again, from a checkpoint of before the first sign.

        Raises `Paused` on all ranks where the run pauses: because that is asked for, or nothing is left to go to.
        """
        if not self.raised:
            return False
        told = self.ranks.share([self._conclude(checkpoints).encode()] if self.ranks.first else None)
        reason = bytes(told[0]).decode()
        if reason:
            raise Paused(reason)
        return True

    def _conclude(self, checkpoints: Checkpoints) -> str:
        """On the first rank: go back, or say why the run pauses."""
        alarm = self._alarm
        assert alarm is not None, "an end without an alarm"
        go_on = f"look into it, then go on with: matpo run CONFIG --resume {self.folder.path}"
        if not self.goes_back:
            return f"training is paused and saved at step {alarm.step}: {alarm}; {go_on}"
        kept = checkpoints.steps_before(alarm.since_step)
        if not kept:
            return f"training is paused at step {alarm.step}: no checkpoint is older than the {alarm}; {go_on}"
        if [one.to_step for one in read_rollbacks(self.folder.rollbacks)].count(kept[0]) >= MOST_ROLLBACKS:
            return (
                f"training is paused at step {alarm.step}: going back to step {kept[0]} {MOST_ROLLBACKS} times did not"
                f" help against the {alarm}; {go_on}"
            )
        append_rollback(self.folder.rollbacks, alarm, to_step=kept[0])
        checkpoints.forget_after(kept[0])
        log.warning("rollback", step=alarm.step, to_step=kept[0], signs=alarm.signs)
        return ""


def vitals(step: int, report: StepReport, intake: IntakeReport) -> Vitals:
    """The figures of a step that are watched, over all roles."""
    plays = intake.role_plays.values()
    cut = sum(play.truncated * play.trajectories for play in plays)
    whole = merged_policy(list(report.roles.values())) if report.roles else None
    return Vitals(
        step=step,
        mismatch_kl=None if whole is None else _finite(whole.mismatch_kl),
        entropy=None if whole is None else _finite(whole.entropy),
        truncated=cut / max(1, sum(play.trajectories for play in plays)),
        gradient_cosine=report.gradient_cosine,
    )


def past_vitals(metrics: Path) -> Iterator[Vitals]:
    """Those of the steps that the run has taken so far."""
    for _, line in read_metrics(metrics):
        if line["stage"] == "trainer" and "vitals" in line:
            yield Vitals.model_validate(line["vitals"])


def _finite(value: float) -> float:
    return value if math.isfinite(value) else BEYOND_ANY_LIMIT
