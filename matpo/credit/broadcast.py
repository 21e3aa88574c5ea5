"""MATPO's credit: one scalar per tree, normalised over the trees of its task, given to every agent of the tree."""

from __future__ import annotations

import numpy as np

EPSILON = 1e-6
"""Added to the standard deviation, as in the released code of arXiv 2510.04678."""


def broadcast(rewards: tuple[float | None, ...], *, normalise_by_std: bool) -> tuple[float | None, ...]:
    """A_i = (r_i - mean_G) / (std_G + ε) over the scored trees of one task, or without the division.

    std_G is the unbiased one (n - 1), as in the released code. A tree without a reward gets None, and so does the only
    scored tree of a group: without a second one there is no baseline.
    """
    scored = np.array([r for r in rewards if r is not None], np.float64)
    if len(scored) < 2:
        return (None,) * len(rewards)
    mean = float(scored.mean())
    scale = float(scored.std(ddof=1)) + EPSILON if normalise_by_std else 1.0
    return tuple(None if r is None else (r - mean) / scale for r in rewards)
