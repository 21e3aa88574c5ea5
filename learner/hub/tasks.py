"""Which task comes next: every epoch is a permutation of its own, drawn from the run's seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from protocols.records import Task


@dataclass(frozen=True, slots=True)
class TaskCursor:
    """The endless order of the training tasks. Position n is the same after any restart."""

    tasks: Sequence[Task]
    seed: int

    def task(self, position: int) -> Task:
        """The task at `position`, 0 … : within an epoch none is repeated and none is left out."""
        epoch, place = divmod(position, len(self.tasks))
        return self.tasks[int(_permutation(len(self.tasks), self.seed, epoch)[place])]


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)
