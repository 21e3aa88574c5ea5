"""`matpo sim`: how far off and how noisy each credit scheme's gradient is, where the exact one can be computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from matpo.credit.broadcast import Broadcast
from matpo.credit.chosen import SCHEMES
from matpo.credit.difference import Difference
from matpo.credit.look_ahead import LookAhead
from matpo.credit.magrpo import Magrpo
from matpo.credit.role_group import RoleGroup
from matpo.credit.scheme import Scheme
from matpo.credit.tree_backup import TreeBackup
from matpo.errors import UserError
from matpo.sim.games import GAMES, Game
from matpo.sim.moments import Enumerated, typical_moments

DEFAULTS: Final = tuple(scheme.model_validate({"name": scheme.model_fields["name"].default}) for scheme in SCHEMES)
TRIED: Final[tuple[Scheme, ...]] = (
    *DEFAULTS,
    Broadcast(normalise_by_std=False),
    RoleGroup(row="tree"),
    TreeBackup(label_above=0.5),
    Magrpo(cross="mean"),
    Magrpo(baseline="none"),
    Magrpo(baseline="max"),
    Magrpo(normalise_by_std=True),
    Difference(against="earlier_mean", score_weight=1.0),
    LookAhead(discount=0.0),
)
"""Every scheme with its defaults, and the options that change what it estimates."""
INTRODUCTION: Final = """\
Small games with tabular agents, played out in every possible way: the gradient of the expected reward, and mean and
variance of every scheme's estimate of it from one group of episodes, are exact. Both columns are relative to the length
of the exact gradient, and medians over {policies} random policies (seed {seed}). For each role and round the mean
estimate is first scaled to the exact length: how far they move is a matter of learning rates and loss weights.

- bias 0: points where the gradient does; 1: leaves it out; 2: points the other way
- noise: standard deviation of the estimate from one group; n groups make it noise / sqrt(n)
"""


def simulate(*, policies: int, seed: int) -> int:
    """Print the table, a game at a time. Returns the exit code."""
    if policies < 1:
        raise UserError(f"--policies is {policies}; it takes 1 or more")
    print(INTRODUCTION.format(policies=policies, seed=seed))
    for game in GAMES:
        for line in table(game, policies=policies, seed=seed):
            print(line, flush=True)
    return 0


def table(game: Game, *, policies: int, seed: int) -> Iterator[str]:
    """The lines of one game: every scheme that its trees have the evidence for."""
    enumerated, random = Enumerated(game), np.random.default_rng(seed)
    tried = [enumerated.random_policy(random) for _ in range(policies)]
    mean = sum(enumerated.value(policy) for policy in tried) / policies
    yield f"### {game.name}"
    yield f"{game.play.__doc__}"
    yield ""
    yield (
        f"Groups of {game.group_size} episodes that can go {len(enumerated.outcomes)} ways;"
        f" expected reward {mean:.2f} on average, {enumerated.best_value():.2f} at best."
    )
    yield ""
    yield "| credit | bias | noise |"
    yield "|---|---:|---:|"
    for scheme in filter(game.suits, TRIED):
        found = typical_moments(enumerated, scheme, tried)
        yield f"| {scheme.title} | {found.bias:.3f} | {found.noise:.2f} |"
    yield ""
