"""What a step consumed, summed up when it is recorded and kept in its row: the trees themselves may go later."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce

from pydantic import Field

from learner.hub.journal import Journal, text
from protocols.records import Record


@dataclass(frozen=True, slots=True)
class Consumed:
    """One tree of a batch, those that the trainer left out included."""

    group: int
    rewards: Mapping[str, float | None]
    staleness: int | None
    """Optimizer steps between its oldest token and the weights it was trained on; None without a sampled token."""


class PartSum(Record):
    """Sum of a reward part over the trees where it was scored."""

    trees: int
    total: float


class StepFigures(Record):
    """Sums over the consumed trees of one step, or of several."""

    trees: int = 0
    parts: dict[str, PartSum] = Field(default={})
    groups: int = 0
    """With a scored answer."""
    all_fail_groups: int = 0
    """Of these, groups in which no answer scored."""
    all_pass_groups: int = 0
    """Of these, groups in which every answer scored fully."""
    aged_trees: int = 0
    """Trees with a staleness."""
    staleness_sum: int = 0
    staleness_max: int | None = None

    @property
    def staleness_mean(self) -> float | None:
        return self.staleness_sum / self.aged_trees if self.aged_trees else None

    def part_mean(self, name: str) -> float | None:
        """Mean of a reward part over the trees that have it."""
        part = self.parts.get(name)
        return None if part is None else part.total / part.trees

    def __add__(self, other: StepFigures) -> StepFigures:
        worst = [value for value in (self.staleness_max, other.staleness_max) if value is not None]
        parts = {**self.parts, **other.parts}
        for name in self.parts.keys() & other.parts.keys():
            one, two = self.parts[name], other.parts[name]
            parts[name] = PartSum(trees=one.trees + two.trees, total=one.total + two.total)
        return StepFigures(
            trees=self.trees + other.trees,
            parts=parts,
            groups=self.groups + other.groups,
            all_fail_groups=self.all_fail_groups + other.all_fail_groups,
            all_pass_groups=self.all_pass_groups + other.all_pass_groups,
            aged_trees=self.aged_trees + other.aged_trees,
            staleness_sum=self.staleness_sum + other.staleness_sum,
            staleness_max=max(worst, default=None),
        )


def sum_up(trees: Iterable[Consumed]) -> StepFigures:
    """The figures of one batch."""
    scored: defaultdict[str, list[float]] = defaultdict(list)
    answers: defaultdict[int, list[float]] = defaultdict(list)
    ages, count = [], 0
    for tree in trees:
        count += 1
        for name, value in tree.rewards.items():
            if value is not None:
                scored[name].append(value)
        answer = tree.rewards.get("answer")
        if answer is not None:
            answers[tree.group].append(answer)
        if tree.staleness is not None:
            ages.append(tree.staleness)
    return StepFigures(
        trees=count,
        parts={name: PartSum(trees=len(values), total=sum(values)) for name, values in scored.items()},
        groups=len(answers),
        all_fail_groups=sum(max(values) <= 0.0 for values in answers.values()),
        all_pass_groups=sum(min(values) >= 1.0 for values in answers.values()),
        aged_trees=len(ages),
        staleness_sum=sum(ages),
        staleness_max=max(ages, default=None),
    )


def read_figures(journal: Journal, *, first: int, last: int) -> StepFigures:
    """Everything that steps `first` … `last` of the surviving weights consumed."""
    rows = journal.rows("SELECT figures FROM steps WHERE undone = 0 AND step BETWEEN ? AND ?", (first, last))
    return reduce(StepFigures.__add__, (StepFigures.model_validate_json(text(row[0])) for row in rows), StepFigures())
