"""`matpo config --matrix`: which topology, credit scheme and objective go together, and why the others do not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, get_args

from matpo.combinations import AT_MOST, MEANING, refusal
from matpo.credit.chosen import SCHEMES
from matpo.credit.magrpo import Magrpo
from matpo.credit.scheme import Scheme
from matpo.objective_config import Objective, Terms

OBJECTIVES: Final[tuple[type[Terms], ...]] = get_args(get_args(Objective)[0])
LETTERS: Final = dict(zip(MEANING, "RLDESTJAFC", strict=True))
"""What stands in the table for each thing that a topology lacks."""


def print_matrix() -> int:
    """Print the tables and their legend. Returns the exit code."""
    for line in matrix():
        print(line)
    return 0


def matrix() -> Iterator[str]:
    """The lines."""
    kinds = tuple(AT_MOST)
    yield "Topology × credit, each topology with the settings that show most: + goes, letters say what is lacking."
    yield ""
    yield _row("", kinds)
    for credit in (_default(scheme) for scheme in SCHEMES):
        cells = ["".join(LETTERS[e] for e in MEANING if e in credit.needs - AT_MOST[kind]) or "+" for kind in kinds]
        yield _row(credit.name, cells)
    yield ""
    yield from (f"{LETTERS[evidence]}  needs {meaning}" for evidence, meaning in MEANING.items())
    yield ""
    yield "Credit × objective: every scheme gives each trajectory one advantage, and that is all an objective asks for."
    names = [objective.model_fields["name"].default for objective in OBJECTIVES]
    yield f"Objectives: {', '.join(names)}. They go with every scheme above, except:"
    yield from refused_objectives()


def refused_objectives() -> Iterator[str]:
    """A line per credit scheme and objective that no topology brings together."""
    schemes = (*(_default(scheme) for scheme in SCHEMES), Magrpo(baseline="max"))
    for credit in schemes:
        for objective in OBJECTIVES:
            reason = refusal("magrpo", frozenset(MEANING), credit, objective())
            if reason is not None:
                yield f"- {credit.title} × {objective.model_fields['name'].default}: {reason}"


def _default(scheme: type[Scheme]) -> Scheme:
    return scheme.model_validate({"name": scheme.model_fields["name"].default})


def _row(name: str, cells: tuple[str, ...] | list[str]) -> str:
    widths = [max(len(kind), 4) for kind in AT_MOST]
    return f"{name:<18}" + "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()
