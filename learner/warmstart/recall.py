"""The reading curriculum: from two facts, each asked several times, to six confusable ones, with some missing.

Trained on whole dialogues alone, a model this small copies the first search hit for good. Taught like this it learns
to read: fresh random facts in every sequence, laid out as the search tool returns them; every fact is asked several
times; a step is taken whenever accuracy passes the bar. It starts with names thrown together without regard to kind,
which leaves nothing but the name itself to go by.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from learner.warmstart import vocabulary
from learner.warmstart.demos import hits_text
from learner.warmstart.fit import Example, Writer
from matpo.datasets.world import NAMES, RELATION, RELATIONS, Fact, Relation

_ALL_NAMES = tuple(name for names in NAMES.values() for name in names)


@dataclass(frozen=True, slots=True)
class Level:
    """``facts`` at most on a page; ``typed``: names fit their relation; ``missing``: share of absent facts asked."""

    facts: int
    asks_per_fact: int
    typed: bool
    missing: float
    bar: float


LEVELS: tuple[Level, ...] = (
    Level(2, 5, typed=False, missing=0.0, bar=0.9),
    Level(3, 4, typed=False, missing=0.0, bar=0.9),
    Level(4, 3, typed=True, missing=0.0, bar=0.9),
    Level(6, 3, typed=True, missing=0.0, bar=0.93),
    Level(6, 2, typed=True, missing=0.25, bar=0.95),
)
"""The curriculum, easiest first."""


def untyped_facts(count: int, rng: random.Random) -> list[Fact]:
    """Facts between any names at all, none twice."""
    names = rng.sample(_ALL_NAMES, 2 * count)
    return [Fact(names[i], rng.choice(RELATIONS).name, names[count + i]) for i in range(count)]


def typed_fact(relation: Relation, rng: random.Random, subject: str | None = None) -> Fact:
    """A fact with names of the right kinds; of no world."""
    chosen = subject or rng.choice(NAMES[relation.subject])
    return Fact(chosen, relation.name, rng.choice(NAMES[relation.object]))


def confusable_facts(count: int, rng: random.Random) -> list[Fact]:
    """``count`` facts with distinct keys, most sharing the subject or the relation of the first."""
    anchor = typed_fact(rng.choice(RELATIONS), rng)
    facts = {anchor.key: anchor}
    siblings = [relation for relation in RELATIONS if relation.subject == RELATION[anchor.relation].subject]
    while len(facts) < count:
        draw = rng.random()
        if draw < 0.35:
            fact = typed_fact(RELATION[anchor.relation], rng)
        elif draw < 0.7:
            fact = typed_fact(rng.choice(siblings), rng, anchor.subject)
        else:
            fact = typed_fact(rng.choice(RELATIONS), rng)
        facts.setdefault(fact.key, fact)
    chosen = list(facts.values())
    rng.shuffle(chosen)
    return chosen


def recall_example(tokenizer: PreTrainedTokenizerFast, level: Level, rng: random.Random) -> Example:
    """One page of hits, then answers: relation and subject given, the object (or "unknown") to be learnt."""
    count = rng.randint(max(2, level.facts - 3), level.facts)
    facts = confusable_facts(count + 2, rng) if level.typed else untyped_facts(count + 2, rng)
    shown, absent = facts[:count], facts[count:]
    asked = shown * level.asks_per_fact
    rng.shuffle(asked)
    writer = Writer(tokenizer)
    writer.add(f"<|system|>{vocabulary.WORKER_PROMPT}{vocabulary.END}<|tool|>")
    writer.add(hits_text(shown) + vocabulary.END)
    for fact in asked:
        missing = rng.random() < level.missing
        key = rng.choice(absent).key if missing else fact.key
        writer.add(f"<|assistant|>{key}")
        writer.add(vocabulary.UNKNOWN_FACT.removeprefix("{subtask} ") if missing else fact.object, learn=True)
        writer.add(vocabulary.END)
    return writer.example()
