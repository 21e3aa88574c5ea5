"""What goes wrong and when: an endless schedule that a seed decides."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

Role = Literal["actor", "hub", "trainer", "tool server", "learner", "run"]
Verb = Literal["kill", "freeze", "cut", "slow", "fill"]
What = Role | Literal["link", "disk"]

SHARES: Mapping[tuple[Verb, What], int] = {
    ("kill", "actor"): 11,
    ("freeze", "actor"): 12,
    ("kill", "hub"): 6,
    ("freeze", "hub"): 10,
    ("kill", "trainer"): 4,
    ("freeze", "trainer"): 10,
    ("kill", "tool server"): 13,
    ("freeze", "tool server"): 11,
    ("cut", "link"): 10,
    ("slow", "link"): 7,
    ("fill", "disk"): 6,
}
"""Of a hundred faults in a row, shuffled."""
RARE: tuple[tuple[Verb, What], ...] = (("kill", "learner"), ("kill", "run"))
"""Once each, among the first hundred: the owners themselves, after which all of it or the learner starts again."""
LASTING_S: Mapping[Verb, tuple[float, float]] = {
    "freeze": (0.5, 6.0),
    "cut": (0.5, 8.0),
    "slow": (2.0, 10.0),
    "fill": (2.0, 8.0),
}
FOR_GOOD_S = 75.0
"""One freeze among `FOR_GOOD_EVERY` lasts so long that somebody must notice and replace what froze."""
FOR_GOOD_EVERY = 40


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong."""

    number: int
    verb: Verb
    what: What
    among: float
    """0 … 1: which of the processes of this role that are there, or which link."""
    lasts_s: float
    """Until it is undone; 0 for a kill."""

    @property
    def name(self) -> str:
        return f"{self.verb} {self.what}"


def schedule(seed: int, *, rare: bool) -> Iterator[Fault]:
    """Faults without end; the same for the same seed. `rare` includes the death of the run's own two owners."""
    rng = random.Random(seed)
    number = 0
    while True:
        kinds = [kind for kind, share in SHARES.items() for _ in range(share)]
        if rare and number == 0:
            kinds += RARE
        rng.shuffle(kinds)
        for verb, what in kinds:
            lasts_s = rng.uniform(*LASTING_S[verb]) if verb in LASTING_S else 0.0
            if verb == "freeze" and rng.randrange(FOR_GOOD_EVERY) == 0:
                lasts_s = FOR_GOOD_S
            yield Fault(number, verb, what, rng.random(), lasts_s)
            number += 1
