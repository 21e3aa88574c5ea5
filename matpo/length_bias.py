"""Are long or hard episodes missing from training? What was trained on, against everything that was played to an end.

Dropping what is slow (timeouts, staleness, outages that hit long episodes more) teaches a policy to be short. With
F the distribution of a figure, p the share of episodes that were dropped, KS(a, b) = max |F_a - F_b|:

    KS(trained, generated) = p · KS(trained, dropped)

is the largest share of episodes that training sees too many or too few of, up to any length. It is alarming above
`TOLERANCE`, unless chance alone explains it: KS(trained, dropped) must pass the two-sample Kolmogorov-Smirnov test at
`SIGNIFICANCE` (critical value sqrt(-ln(α/2)/2 · (n + m)/(n · m))).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from protocols.records import Floats, Record

TOLERANCE: Final = 0.05
SIGNIFICANCE: Final = 0.001
QUANTILES: Final = (0.1, 0.5, 0.9, 0.99)

Figure = Literal["seconds", "sampled_tokens", "reward_of_task", "hops"]


@dataclass(frozen=True, slots=True)
class Finished:
    """One episode of a task that is trained on or given up."""

    trained: bool
    seconds: float
    sampled_tokens: int
    reward_of_task: float | None
    """Mean over the task's scored episodes: its difficulty, as far as it is known."""
    hops: float | None
    """The task's own measure of difficulty, if its metadata has one."""


class Divergence(Record):
    """One figure of trained and of all episodes."""

    figure: Figure
    trained_mean: float
    generated_mean: float
    trained_quantiles: tuple[float, ...]
    """At 10, 50, 90 and 99 %."""
    generated_quantiles: tuple[float, ...]
    distance: float
    """KS(trained, generated)."""
    alarming: bool


class BiasAudit(Record):
    """What training sees of what is played."""

    generated: int
    trained: int
    divergences: tuple[Divergence, ...]
    """Of every figure that is known of trained and of dropped episodes."""

    @property
    def alarms(self) -> tuple[str, ...]:
        """A line for people per figure that diverges."""
        return tuple(
            f"{d.figure}: {d.trained_mean:.3g} on average in what is trained on,"
            f" {d.generated_mean:.3g} in what is played (distance {d.distance:.2f})"
            for d in self.divergences
            if d.alarming
        )


REMEDY: Final = (
    "long or hard episodes are dropped more often than others; see the ledger's filtered reasons, and raise"
    " episode.timeout_s, hub.lease_s, freshness.max_staleness_steps or the tools' timeouts"
)


def audit(episodes: Sequence[Finished]) -> BiasAudit:
    """Compare the trained episodes with all of them."""
    readers: dict[Figure, Callable[[Finished], float | None]] = {
        "seconds": lambda episode: episode.seconds,
        "sampled_tokens": lambda episode: episode.sampled_tokens,
        "reward_of_task": lambda episode: episode.reward_of_task,
        "hops": lambda episode: episode.hops,
    }
    divergences = (_compare(figure, episodes, read) for figure, read in readers.items())
    return BiasAudit(
        generated=len(episodes),
        trained=sum(episode.trained for episode in episodes),
        divergences=tuple(found for found in divergences if found is not None),
    )


def distance(one: Floats, two: Floats) -> float:
    """KS distance of two samples: the largest difference of their cumulative distributions."""
    places = np.union1d(one, two)
    shares = [np.searchsorted(np.sort(sample), places, side="right") / len(sample) for sample in (one, two)]
    return float(np.abs(shares[0] - shares[1]).max())


def critical_distance(one: int, two: int) -> float:
    """Distance that two samples of these sizes from one distribution exceed with probability `SIGNIFICANCE`."""
    return math.sqrt(-math.log(SIGNIFICANCE / 2) / 2 * (one + two) / (one * two))


def _compare(
    figure: Figure, episodes: Sequence[Finished], read: Callable[[Finished], float | None]
) -> Divergence | None:
    known = [(value, episode.trained) for episode in episodes if (value := read(episode)) is not None]
    values = np.array([value for value, _ in known], dtype=np.float32)
    chosen = np.array([was_trained for _, was_trained in known], dtype=bool)
    trained, dropped = values[chosen], values[~chosen]
    if not len(trained) or not len(dropped):
        return None
    apart = distance(trained, dropped)
    shifted = apart * len(dropped) / len(values)
    return Divergence(
        figure=figure,
        trained_mean=round(float(trained.mean()), 4),
        generated_mean=round(float(values.mean()), 4),
        trained_quantiles=tuple(round(float(q), 4) for q in np.quantile(trained, QUANTILES)),
        generated_quantiles=tuple(round(float(q), 4) for q in np.quantile(values, QUANTILES)),
        distance=round(shifted, 4),
        alarming=shifted > TOLERANCE and apart > critical_distance(len(trained), len(dropped)),
    )
