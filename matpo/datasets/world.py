"""The generated fictional world of the quick start: people, companies, cities, countries, and questions over them.

One integer seed makes one world: about a hundred facts ``relation subject object``, each a one-line document, and
multi-hop questions whose answer follows from a chain of those facts. Names and question templates are shared by all
worlds, facts are drawn afresh, so a model can learn to look things up but cannot know an answer by heart. Every
(subject, relation) pair has one object, hence one right answer. Pure functions of the seed; no torch, no I/O.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Kind = Literal["person", "company", "city", "country", "language"]

TRAIN_FIRST_SEED = 0
HELD_OUT_FIRST_SEED = 100_000
"""Worlds from this seed on are for evaluation only; training and warm start stay below it."""

_PEOPLE = """Alice Bruno Carla Dario Elena Felix Greta Hugo Irene Jonas Klara Luis Mina Nora Oscar Paula
Quinn Rosa Simon Tara Ugo Vera Walter Xenia Yusuf Zoe Anton Bella Cyrus Dora Emil Fiona"""
_COMPANIES = """Acme Borel Cintra Dynex Evora Fulcrum Gantry Helix Indigo Juniper Kestrel Lumen Mistral Nimbus Orbit
Pallas"""
_CITIES = """Arden Belmar Corvo Delmont Eastby Farrow Glenrock Harwick Islay Jarrow Kelso Lorne Marlow Norby Oakham
Penrith Quarry Rosslyn Selby Thorne"""
_COUNTRIES = "Avaria Bremia Caldora Drevia Eldoria Fenland Galdor Hestia Istria Jorvia"
_LANGUAGES = "Avarish Bremic Caldoran Drevic Eldish Fennic Galdic Hestian Istric Jorvian"

NAMES: dict[Kind, tuple[str, ...]] = {
    "person": tuple(_PEOPLE.split()),
    "company": tuple(_COMPANIES.split()),
    "city": tuple(_CITIES.split()),
    "country": tuple(_COUNTRIES.split()),
    "language": tuple(_LANGUAGES.split()),
}
"""Every name there is, by kind; one word each, shared by all worlds."""

_WORLD_SIZE: dict[Kind, int] = {"person": 16, "company": 8, "city": 10, "country": 6, "language": 6}


@dataclass(frozen=True, slots=True)
class Relation:
    """A function from the entities of one kind to those of another; ``one_to_one`` where no object repeats."""

    name: str
    subject: Kind
    object: Kind
    one_to_one: bool


RELATIONS: tuple[Relation, ...] = (
    Relation("employer", "person", "company", False),
    # One-to-one, so that a search for "mentor X" matches at most two documents in full, never a page of them.
    Relation("mentor", "person", "person", True),
    Relation("hometown", "person", "city", False),
    Relation("founder", "company", "person", True),
    Relation("seat", "company", "city", False),
    Relation("mayor", "city", "person", True),
    Relation("country", "city", "country", False),
    Relation("capital", "country", "city", True),
    Relation("language", "country", "language", True),
)
RELATION: dict[str, Relation] = {relation.name: relation for relation in RELATIONS}


@dataclass(frozen=True, slots=True)
class Template:
    """One wording of a question: ``{x}`` stands for the subject, ``relations`` is the chain to follow from it."""

    text: str
    relations: tuple[str, ...]

    @property
    def name(self) -> str:
        """The chain, e.g. ``employer>founder``; unique."""
        return ">".join(self.relations)

    @property
    def hops(self) -> int:
        """Facts needed: 1 to 3."""
        return len(self.relations)

    @property
    def subject_kind(self) -> Kind:
        """What ``{x}`` must be."""
        return RELATION[self.relations[0]].subject


TEMPLATES: tuple[Template, ...] = (
    Template("who is the employer of {x} ?", ("employer",)),
    Template("who is the founder of {x} ?", ("founder",)),
    Template("in which city was {x} born ?", ("hometown",)),
    Template("which language is spoken in {x} ?", ("language",)),
    Template("who is the founder of the employer of {x} ?", ("employer", "founder")),
    Template("in which city is the employer of {x} based ?", ("employer", "seat")),
    Template("who is the employer of the mentor of {x} ?", ("mentor", "employer")),
    Template("who is the mayor of the city where {x} was born ?", ("hometown", "mayor")),
    Template("in which country is {x} based ?", ("seat", "country")),
    Template("which language is spoken in the country of {x} ?", ("country", "language")),
    Template("in which city was the founder of the employer of {x} born ?", ("employer", "founder", "hometown")),
    Template("in which city is the employer of the mentor of {x} based ?", ("mentor", "employer", "seat")),
    Template("what is the capital of the country where {x} was born ?", ("hometown", "country", "capital")),
    Template("who is the mayor of the city where the employer of {x} is based ?", ("employer", "seat", "mayor")),
    Template("in which country was the founder of {x} born ?", ("founder", "hometown", "country")),
    Template("which language is spoken in the country where {x} is based ?", ("seat", "country", "language")),
)


@dataclass(frozen=True, slots=True)
class Fact:
    """Three words: ``employer Alice Acme`` says that the employer of Alice is Acme.

    The object follows the subject: with the relation between them, a one-million-parameter model needed many times
    more training before it could look a fact up.
    """

    subject: str
    relation: str
    object: str

    @property
    def text(self) -> str:
        """The three words, as a worker reports them."""
        return f"{self.relation} {self.subject} {self.object}"

    @property
    def key(self) -> str:
        """Relation and subject: what a planner delegates and a worker searches."""
        return f"{self.relation} {self.subject}"

    @property
    def document(self) -> str:
        """The text that is indexed and returned by search."""
        return f"{self.text} ."


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its one right answer and the chain of facts that proves it; ``world`` is the world's seed."""

    text: str
    answer: str
    world: int
    template: str
    hops: int
    chain: tuple[Fact, ...]


@dataclass(frozen=True, slots=True)
class World:
    """All facts of one seed, in a fixed order, and the entities they are about."""

    seed: int
    entities: dict[Kind, tuple[str, ...]]
    facts: tuple[Fact, ...]

    def lookup(self, subject: str, relation: str) -> Fact:
        """The one fact of this subject and relation; KeyError where there is none."""
        for fact in self.facts:
            if fact.subject == subject and fact.relation == relation:
                return fact
        raise KeyError(f"no fact '{relation} {subject}' in world {self.seed}")


def _objects(relation: Relation, subjects: int, pool: tuple[str, ...], rng: random.Random) -> list[str]:
    """One object per subject: without repeats where the relation is one-to-one."""
    if relation.one_to_one:
        return rng.sample(pool, subjects)
    return [rng.choice(pool) for _ in range(subjects)]


@lru_cache(maxsize=512)
def make_world(seed: int) -> World:
    """The world of ``seed``: the same on every machine (it uses only `random.Random` seeded with a string)."""
    rng = random.Random(f"matpo-world-{seed}")
    entities: dict[Kind, tuple[str, ...]] = {
        kind: tuple(rng.sample(names, _WORLD_SIZE[kind])) for kind, names in NAMES.items()
    }
    facts: list[Fact] = []
    for relation in RELATIONS:
        subjects = entities[relation.subject]
        objects = _objects(relation, len(subjects), entities[relation.object], rng)
        while relation.subject == relation.object and any(s == o for s, o in zip(subjects, objects, strict=True)):
            objects = _objects(relation, len(subjects), entities[relation.object], rng)  # nobody mentors themselves
        facts += [Fact(s, relation.name, o) for s, o in zip(subjects, objects, strict=True)]
    return World(seed, entities, tuple(facts))


def collection(world_seed: int) -> str:
    """The name under which a world's documents are indexed."""
    return f"world-{world_seed}"


def documents(world_seed: int) -> list[tuple[str, str]]:
    """(document id, text) of every fact of the world, e.g. ``("world-3-17", "employer Alice Acme .")``."""
    facts = make_world(world_seed).facts
    return [(f"{collection(world_seed)}-{index}", fact.document) for index, fact in enumerate(facts)]


def follow(world: World, subject: str, relations: tuple[str, ...]) -> tuple[Fact, ...]:
    """The chain of facts from ``subject`` along ``relations``."""
    chain: list[Fact] = []
    for relation in relations:
        chain.append(world.lookup(subject, relation))
        subject = chain[-1].object
    return tuple(chain)


def ask(world: World, template: Template, rng: random.Random) -> Question:
    """One question of this template; no entity comes twice in its chain, so that stopping early is never right."""
    while True:
        subject = rng.choice(world.entities[template.subject_kind])
        chain = follow(world, subject, template.relations)
        if len({subject, *(fact.object for fact in chain)}) == template.hops + 1:
            text = template.text.format(x=subject)
            return Question(text, chain[-1].object, world.seed, template.name, template.hops, chain)


def questions(world_seed: int, count: int, *, stream: str = "questions") -> list[Question]:
    """``count`` questions about one world, templates in shuffled rounds so that each comes equally often.

    Another ``stream`` name gives other questions about the same facts.
    """
    world, rng = make_world(world_seed), random.Random(f"matpo-{stream}-{world_seed}")
    chosen: list[Template] = []
    while len(chosen) < count:
        chosen += rng.sample(TEMPLATES, len(TEMPLATES))
    return [ask(world, template, rng) for template in chosen[:count]]
