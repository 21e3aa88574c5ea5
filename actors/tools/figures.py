"""Counts what the calls of a tool come to and how long they take."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from matpo.tool_figures import ToolFigures
from protocols.records import Outcome

_STEP = 1.15
"""Ratio of neighbouring latency classes: quantiles are right to within this factor."""
_SHORTEST_S = 1e-5


class Latencies:
    """A histogram of durations in classes of equal ratio, small whatever its count."""

    def __init__(self) -> None:
        self._classes: dict[int, int] = {}
        self.count = 0

    def add(self, seconds: float) -> None:
        """Count one duration."""
        number = round(math.log(max(seconds, _SHORTEST_S) / _SHORTEST_S, _STEP))
        self._classes[number] = self._classes.get(number, 0) + 1
        self.count += 1

    def quantile(self, share: float) -> float:
        """Seconds that this share of the durations did not exceed; 0 of nothing."""
        left = share * self.count
        for number in sorted(self._classes):
            left -= self._classes[number]
            if left <= 0:
                return _SHORTEST_S * _STEP**number
        return 0.0


@dataclass(slots=True)
class ToolCount:
    """What the calls of one tool came to so far."""

    calls: int = 0
    recorded: int = 0
    model_errors: int = 0
    infrastructure_errors: int = 0
    seconds: float = 0.0
    result_bytes: int = 0
    latencies: Latencies = field(default_factory=Latencies)

    def add(self, outcome: Outcome, *, seconds: float, result_bytes: int, recorded: bool) -> None:
        """Count one call."""
        self.calls += 1
        self.recorded += recorded
        self.model_errors += outcome == "model_error"
        self.infrastructure_errors += outcome == "infrastructure"
        self.seconds += seconds
        self.result_bytes += result_bytes
        self.latencies.add(seconds)

    def figures(self, tool: str) -> ToolFigures:
        """As a line of the metrics."""
        return ToolFigures(
            tool=tool,
            calls=self.calls,
            recorded=self.recorded,
            model_errors=self.model_errors,
            infrastructure_errors=self.infrastructure_errors,
            result_bytes=self.result_bytes,
            mean_ms=round(1e3 * self.seconds / max(1, self.calls), 3),
            p50_ms=round(1e3 * self.latencies.quantile(0.5), 3),
            p99_ms=round(1e3 * self.latencies.quantile(0.99), 3),
        )
