"""MAGRPO's rewards for two who write together, a short text and a longer one (arXiv 2508.04652; CoMLRL): no judge.

The reference describes its transition words and bands in prose and code that differ; what counts here is in the tables.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from matpo.rewards.verdict import Verdict

TRANSITIONS: Final = {
    "addition": ("also", "moreover", "furthermore", "besides", "additionally"),
    "contrast": ("however", "but", "although", "yet", "nevertheless", "instead"),
    "cause": ("because", "therefore", "thus", "hence", "consequently", "so"),
    "example": ("example", "instance", "specifically", "namely", "particularly"),
    "time": ("then", "first", "next", "finally", "meanwhile", "afterwards"),
    "summary": ("overall", "summary", "conclusion", "short", "ultimately"),
}
"""Kinds of transition words."""
BEST: Final = 3.0
"""Points."""
ENOUGH_KINDS: Final = 3
"""Kinds for the full score."""
_WORD: Final = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
_STOP_WORDS: Final = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "by",
        "for",
        "from",
        "in",
        "is",
        "it",
        "of",
        "on",
        "or",
        "that",
        "the",
        "this",
        "to",
        "was",
        "were",
        "with",
    ]
)


@dataclass(frozen=True, slots=True)
class Band:
    """1 from `low` to `high`, falling to 0 at `lowest` and `highest` along straight lines."""

    lowest: float
    low: float
    high: float
    highest: float

    def score(self, value: float) -> float:
        """Between 0 and 1."""
        if self.low <= value <= self.high:
            return 1.0
        if not self.lowest < value < self.highest:
            return 0.0
        if value < self.low:
            return (value - self.lowest) / (self.low - self.lowest)
        return (self.highest - value) / (self.highest - self.high)


@dataclass(frozen=True, slots=True)
class Bands:
    """What a writing task asks of the two texts."""

    fewest_words: int
    most_words: int
    ratio: Band
    """Words of the second text over those of the first."""
    unique: Band
    """Different words, common ones aside, of the second over those of the first."""


_NEVER = float("inf")
TLDR: Final = Bands(8, 256, Band(1.1, 1.6, 3.2, 5.0), Band(1.3, 2.0, _NEVER, _NEVER))
"""A concise and a detailed summary."""
ARXIV: Final = Bands(128, 256, Band(0.8, 1.3, 1.6, 2.0), Band(0.7, 0.7, 1.3, 1.3))
"""Background and method of an expanded abstract; the different words are all or nothing."""


def writing(messages: Sequence[str], bands: Bands) -> Verdict:
    """Share of 3 points, each level only after the one before: 0.5 per text of the right length; 1 for the ratio of
    lengths; 0.5 for the ratio of different words; 1 for style: 0.4 transition words, 0.6 words in common (Jaccard).
    """
    if len(messages) != 2:
        raise ValueError(f"the writing rewards are for two agents, not {len(messages)}")
    first, second = (_WORD.findall(message.lower()) for message in messages)
    fits = [bands.fewest_words <= len(words) <= bands.most_words for words in (first, second)]
    points = 0.5 * sum(fits)
    if not all(fits):
        return Verdict(points / BEST, feedback=f"Each text needs {bands.fewest_words} to {bands.most_words} words.")
    ratio = bands.ratio.score(len(second) / len(first))
    points += ratio
    if not ratio:
        return Verdict(points / BEST, feedback=f"The second text has {len(second)} words, the first {len(first)}.")
    one, other = ({word for word in words if word not in _STOP_WORDS} for words in (first, second))
    unique = bands.unique.score(len(other) / len(one)) if one else 0.0
    points += 0.5 * unique
    if not unique:
        return Verdict(points / BEST, feedback="The number of different words in the two texts does not fit.")
    style = 0.4 * transitions([*first, *second]) + 0.6 * len(one & other) / len(one | other)
    told = "Use transition words and the same terms in both texts."
    return Verdict((points + style) / BEST, passed=style >= 1, feedback=told)


def transitions(words: Sequence[str]) -> float:
    """Share of `ENOUGH_KINDS` kinds of transition words that occur, at most 1."""
    given = set(words)
    return min(1.0, sum(not given.isdisjoint(kind) for kind in TRANSITIONS.values()) / ENOUGH_KINDS)
