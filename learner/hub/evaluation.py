"""Held-out questions beside training: a round before the first step, some on the way, one after the last."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import orjson
from pydantic import JsonValue

from learner.hub.journal import Journal, integer, maybe_integer, real, text
from learner.hub.leases import SURPLUS, Leases
from matpo.config import Evaluation
from protocols.records import Record, Task

Label = Literal["before", "during", "after"]


class EvaluationRecord(Record):
    """One finished round, as the metrics file and the summary show it."""

    name: str
    label: Label
    step: int
    """Optimizer steps taken when the round became due."""
    oldest_version: int | None
    newest_version: int | None
    """Weights that played it."""
    questions: int
    scored: int
    """Questions whose episode could be scored; the means are over these."""
    accuracy: float | None
    format: float | None
    reward: float | None
    reading: float | None
    """Mean of the reward part `reading` where it applies."""
    accuracy_by_hops: dict[str, float]
    accuracy_by_template: dict[str, float]
    seconds_mean: float | None
    """Seconds per episode."""
    sampled_tokens_mean: float | None
    all_correct: int
    """Questions with the full answer reward."""


@dataclass(frozen=True, slots=True)
class Played:
    """What an evaluation reads off one scored tree."""

    rewards: dict[str, float | None]
    metadata: dict[str, JsonValue]
    seconds: float
    sampled_tokens: int


class Evaluator:
    """Starts rounds when they are due and sums up the finished ones, inside the caller's transaction."""

    def __init__(
        self, journal: Journal, leases: Leases, config: Evaluation, tasks: Sequence[Task], *, steps: int
    ) -> None:
        self._journal = journal
        self._leases = leases
        self._config = config
        self._tasks = tasks
        self._steps = steps

    def start_due(self, step: int, *, at: float) -> None:
        """Open the rounds that the published weights of `step` call for; each is opened once."""
        everything = self._tasks[: self._config.questions]
        if step == 0:
            self._start("before", "before", 0, everything, at=at)
        elif step >= self._steps:
            self._start("after", "after", self._steps, everything, at=at)
        elif self._config.every_steps and step % self._config.every_steps == 0:
            self._start(f"step-{step}", "during", step, self._some(step // self._config.every_steps - 1), at=at)

    def finish_played(self, *, at: float) -> list[EvaluationRecord]:
        """Rounds whose last episode came in since the last call."""
        rows = self._journal.rows(
            "SELECT name FROM rounds WHERE finished_at IS NULL AND NOT EXISTS"
            " (SELECT 1 FROM groups WHERE round = name AND state = 'open') ORDER BY began_at"
        )
        records = [read_round(self._journal, text(name)) for (name,) in rows]
        for record in records:
            self._journal.execute(
                "UPDATE rounds SET finished_at = ?, figures = ? WHERE name = ?",
                (at, record.model_dump_json(), record.name),
            )
        return records

    def all_finished(self) -> bool:
        """Whether nothing is left to evaluate, the last round included."""
        wanted = "before" if self._steps == 0 else "after"
        if self._config.questions and not self._journal.number(
            "SELECT COUNT(*) FROM rounds WHERE name = ? AND finished_at IS NOT NULL", (wanted,)
        ):
            return False
        return self._journal.number("SELECT COUNT(*) FROM rounds WHERE finished_at IS NULL") == 0

    def _some(self, turn: int) -> list[Task]:
        """A window of the questions that moves on with every round."""
        count = min(self._config.questions_during, len(self._tasks))
        return [self._tasks[(turn * count + place) % len(self._tasks)] for place in range(count)]

    def _start(self, name: str, label: Label, step: int, tasks: Sequence[Task], *, at: float) -> None:
        known = self._journal.row("SELECT 1 FROM rounds WHERE name = ?", (name,))
        if known is not None or not tasks:
            return
        self._journal.execute(
            "INSERT INTO rounds VALUES (?, ?, ?, ?, ?, NULL, NULL)", (name, label, step, len(tasks), at)
        )
        for task in tasks:
            self._leases.open_group(task, purpose="eval", round_name=name, episodes=1, at=at)


def read_round(journal: Journal, name: str) -> EvaluationRecord:
    """Sum up a round; one that has finished was summed up then, and its trees may be gone."""
    row = journal.row("SELECT label, step, questions, figures FROM rounds WHERE name = ?", (name,))
    assert row is not None, f"evaluation round {name!r} does not exist"
    if row[3] is not None:
        return EvaluationRecord.model_validate_json(text(row[3]))
    label = text(row[0])
    trees = journal.rows(
        "SELECT rewards, task, seconds, sampled_tokens, oldest_version, newest_version"
        " FROM groups JOIN trees ON group_seq = groups.seq"
        " WHERE round = ? AND trees.state = 'evaluation' AND reward IS NOT NULL AND trees.reason IS NOT ?"
        " ORDER BY groups.seq",
        (name, SURPLUS),
    )
    played = [
        Played(orjson.loads(text(t[0])), Task.model_validate_json(text(t[1])).metadata, real(t[2]), integer(t[3]))
        for t in trees
    ]
    oldest = [version for tree in trees if (version := maybe_integer(tree[4])) is not None]
    newest = [version for tree in trees if (version := maybe_integer(tree[5])) is not None]
    return EvaluationRecord(
        name=name,
        label="before" if label == "before" else "after" if label == "after" else "during",
        step=integer(row[1]),
        oldest_version=min(oldest, default=None),
        newest_version=max(newest, default=None),
        questions=integer(row[2]),
        scored=len(played),
        accuracy=part_mean(played, "answer"),
        format=part_mean(played, "format"),
        reward=part_mean(played, "total"),
        reading=part_mean(played, "reading"),
        accuracy_by_hops=accuracy_by(played, "hops"),
        accuracy_by_template=accuracy_by(played, "template"),
        seconds_mean=mean(tree.seconds for tree in played),
        sampled_tokens_mean=mean(tree.sampled_tokens for tree in played),
        all_correct=sum((tree.rewards.get("answer") or 0.0) >= 1.0 for tree in played),
    )


def mean(values: Iterable[float]) -> float | None:
    """The mean, rounded to six digits; None of nothing."""
    found = list(values)
    return round(sum(found) / len(found), 6) if found else None


def part_mean(played: Sequence[Played], part: str) -> float | None:
    """Mean of a reward part over the trees that have it and to which it applies."""
    return mean(value for tree in played if (value := tree.rewards.get(part)) is not None)


def accuracy_by(played: Sequence[Played], key: str) -> dict[str, float]:
    """Mean answer reward by a metadata value, for trees that have it."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for tree in played:
        answer = tree.rewards.get("answer")
        if key in tree.metadata and answer is not None:
            found[str(tree.metadata[key])].append(answer)
    return {name: round(sum(values) / len(values), 6) for name, values in sorted(found.items())}
