"""What a credit scheme is: options that are part of the config, what it needs to be recorded, and one pure function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Final, Literal

from matpo.section import Section
from protocols.records import EpisodeGroup

TreeAdvantages = tuple[float | None, ...]
"""One per trajectory of a tree; None means not scored (never 0) and keeps the trajectory out of the loss."""
GroupAdvantages = tuple[TreeAdvantages, ...]

Evidence = Literal[
    "several_roles",
    "leader",
    "delegation",
    "earned",
    "leaf_scores",
    "rounds",
    "joints",
    "alternatives",
    "returns",
    "counterfactuals",
]
"""What the trees of a topology show beside their total; `matpo.combinations` says in words what each of them is."""

Memory = Mapping[str, float]
"""What a scheme carries from step to step, saved with the checkpoints."""
NOTHING: Final[Memory] = {}
"""What is remembered before the first step."""


class Scheme(Section):
    """Base of the credit schemes. Each is a file of its own with its options, its needs and its formula."""

    name: str
    needs: ClassVar[frozenset[Evidence]] = frozenset()
    """Evidence without which the scheme could score nothing, or nothing beyond what a simpler one scores."""
    judges: ClassVar[Literal["trees", "acts"]] = "trees"
    """`trees`: equal totals of a group mean that all its advantages are 0."""

    @property
    def one_sided(self) -> bool:
        """Whether no advantage is ever above 0."""
        return False

    @property
    def title(self) -> str:
        """Its name and the options that differ from their defaults."""
        return " ".join(
            [self.name, *(f"{key}={value}" for key, value in self.model_dump(exclude_defaults=True).items())]
        )

    def credit(self, group: EpisodeGroup, memory: Memory) -> GroupAdvantages:
        """Advantage of every trajectory of every tree of one task. Changes nothing."""
        raise NotImplementedError

    def remember(self, memory: Memory, groups: Sequence[EpisodeGroup]) -> Memory:
        """What to carry on after a step on `groups`."""
        return memory
