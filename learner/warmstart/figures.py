"""What a quick-start checkpoint can do on held-out worlds: accuracy by hops and template, format, reading, groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from transformers import Qwen3ForCausalLM

from learner.warmstart.play import Episode, Player, play
from matpo.datasets.world import HELD_OUT_FIRST_SEED, Question, questions

WORLDS = range(HELD_OUT_FIRST_SEED, HELD_OUT_FIRST_SEED + 32)
QUESTIONS_PER_WORLD = 16
GROUP = 8
_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Figures:
    """Shares in [0, 1] unless said otherwise."""

    episodes: int
    accuracy: float
    accuracy_by_hops: dict[int, float]
    accuracy_by_template: dict[str, float]
    format: float
    reading: float
    """Workers that reported the right fact, among those that had it in their hits but not first."""
    reading_first: float
    """The same, where it was first."""
    fact_absent: float
    """Workers whose fact was in none of their hits."""
    said_unknown_when_absent: float
    workers_per_episode: float
    tokens_per_episode: float


@dataclass(frozen=True, slots=True)
class Groups:
    """Over groups of `GROUP` sampled episodes of one question: those in which no episode, or every one, was right."""

    groups: int
    all_fail: float
    all_pass: float


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return round(sum(listed) / len(listed), 4) if listed else 0.0


def play_all(
    player: Player, model: Qwen3ForCausalLM, asked: Sequence[Question], *, temperature: float, seed: int
) -> list[Episode]:
    """`play`, a bounded number of episodes at once."""
    episodes: list[Episode] = []
    for start in range(0, len(asked), _AT_ONCE):
        page = asked[start : start + _AT_ONCE]
        episodes += play(player, model, page, temperature=temperature, seed=seed + start)
    return episodes


def figures(episodes: Sequence[Episode]) -> Figures:
    """The figures of these episodes."""
    by_hops: dict[int, list[float]] = defaultdict(list)
    by_template: dict[str, list[float]] = defaultdict(list)
    for episode in episodes:
        by_hops[episode.question.hops].append(episode.correct)
        by_template[episode.question.template].append(episode.correct)
    readings = [reading for episode in episodes for reading in episode.readings]
    return Figures(
        episodes=len(episodes),
        accuracy=_mean(episode.correct for episode in episodes),
        accuracy_by_hops={hops: _mean(values) for hops, values in sorted(by_hops.items())},
        accuracy_by_template={name: _mean(by_template[name]) for name in sorted(by_template)},
        format=_mean(episode.format for episode in episodes),
        reading=_mean(reading.right for reading in readings if reading.present and not reading.first),
        reading_first=_mean(reading.right for reading in readings if reading.present and reading.first),
        fact_absent=_mean(not reading.present for reading in readings),
        said_unknown_when_absent=_mean(reading.said_nothing for reading in readings if not reading.present),
        workers_per_episode=_mean(len(episode.played) - 1 for episode in episodes),
        tokens_per_episode=_mean(sum(len(played.tokens) for played in episode.played) for episode in episodes),
    )


def groups(episodes: Sequence[Episode]) -> Groups:
    """All-fail and all-pass shares; ``episodes`` are consecutive groups of `GROUP` of one question."""
    right = [
        sum(episode.correct for episode in episodes[start : start + GROUP]) for start in range(0, len(episodes), GROUP)
    ]
    return Groups(len(right), _mean(count == 0 for count in right), _mean(count == GROUP for count in right))


def measure(player: Player, model: Qwen3ForCausalLM, *, seed: int = 0) -> dict[str, object]:
    """Greedy and sampled figures on the held-out worlds, and the groups a learner would see; JSON-able."""
    asked = [question for world in WORLDS for question in questions(world, QUESTIONS_PER_WORLD)]
    greedy = play_all(player, model, asked, temperature=0.0, seed=seed)
    few = asked[: len(asked) // 4]
    sampled = play_all(player, model, [q for q in few for _ in range(GROUP)], temperature=1.0, seed=seed)
    return {
        "greedy": asdict(figures(greedy)),
        "sampled": asdict(figures(sampled)),
        "groups": asdict(groups(sampled)),
    }
