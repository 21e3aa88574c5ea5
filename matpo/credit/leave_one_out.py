"""Leave-one-out credit (RLOO): a tree against the mean of the other trees of its task."""

from __future__ import annotations

import numpy as np


def leave_one_out(rewards: tuple[float | None, ...]) -> tuple[float | None, ...]:
    """A_i = r_i - mean of the other scored rewards; None for trees without a reward, or without another one."""
    scored = np.array([r for r in rewards if r is not None], np.float64)
    if len(scored) < 2:
        return (None,) * len(rewards)
    total, others = float(scored.sum()), len(scored) - 1
    return tuple(None if r is None else r - (total - r) / others for r in rewards)
