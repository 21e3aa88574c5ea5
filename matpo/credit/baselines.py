"""Values of comparable acts against one another: the arithmetic that the schemes share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, assert_never

import numpy as np
from numpy.typing import NDArray

EPSILON: Final = 1e-6
"""Added to the standard deviation, as in the released code of MATPO (arXiv 2510.04678)."""

Baseline = Literal["mean", "others", "max", "none"]
"""What is subtracted: the mean of all (GRPO), of the others (leave-one-out), the largest (ReMax's idea), or nothing."""

Values = Sequence[float | None]


def compared(values: Values, *, baseline: Baseline, normalise_by_std: bool) -> tuple[float | None, ...]:
    """Each value minus its baseline, divided on request by std + ε, the unbiased one (n - 1) as in MATPO's code.

    None stays None and has no part in any baseline. A lone scored value gets None too, because there is nothing to
    compare it with, unless nothing is subtracted.
    """
    scored = np.array([value for value in values if value is not None], np.float64)
    if len(scored) < 2 and (baseline != "none" or normalise_by_std):
        return (None,) * len(values)
    scale = float(scored.std(ddof=1)) + EPSILON if normalise_by_std else 1.0
    return tuple(None if value is None else (value - _baseline(value, scored, baseline)) / scale for value in values)


def _baseline(value: float, scored: NDArray[np.float64], baseline: Baseline) -> float:
    match baseline:
        case "mean":
            return float(scored.mean())
        case "others":
            return (float(scored.sum()) - value) / (len(scored) - 1)
        case "max":
            return float(scored.max())
        case "none":
            return 0.0
        case _:
            assert_never(baseline)


def mean(values: Values) -> float | None:
    """Of the scored values; None without one."""
    scored = [value for value in values if value is not None]
    return sum(scored) / len(scored) if scored else None
