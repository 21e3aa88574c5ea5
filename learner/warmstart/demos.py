"""Scripted demonstrations of planner and worker: the right format and careful reading, but bad planning habits.

The planner of these demonstrations often stops one hop early, delegates vaguely, gives up when a worker finds
nothing, and half of the three-hop questions are never seen through to the end. The worker reads its hits rightly and
says so when the fact is not among them, but often forgets half of its query. A second search or a second request
for the same fact does occur, at random, never because it was needed: when to do so is left for training to find.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from learner.warmstart import vocabulary
from learner.warmstart.fit import Example, Writer
from matpo.datasets.world import TEMPLATES, Fact, Question, World, make_world

NEVER_FINISHED = tuple(template.name for template in TEMPLATES if template.hops == 3)[::2]
"""Three-hop templates whose third fact no demonstration asks for."""


@dataclass(frozen=True, slots=True)
class SearchNoise:
    """What the search tool does to a ranking: ``least..most`` hits, each replaced with probability ``replace``."""

    least: int = 3
    most: int = 6
    replace: float = 0.10


@dataclass(frozen=True, slots=True)
class Habits:
    """Probabilities of the demonstrators' choices."""

    stop_after_one_of_two: float = 0.60
    stop_after_one_of_three: float = 0.35
    stop_after_two_of_three: float = 0.75
    break_off: bool = False
    """End the demonstrations of the never finished templates at the second report, with nothing said after it;
    otherwise they answer with what the second report says."""
    vague_subtask: float = 0.20
    ask_twice: float = 0.06
    go_on_after_wrong_report: float = 0.3
    partial_query: float = 0.15
    search_twice: float = 0.08


class Searcher:
    """The search tool over one world: words matched by rarity, as BM25 does for documents of equal length."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._holding: dict[str, set[int]] = defaultdict(set)
        for index, fact in enumerate(world.facts):
            for word in (fact.subject, fact.relation, fact.object):
                self._holding[word].add(index)

    def search(self, query: str, noise: SearchNoise, rng: random.Random) -> list[Fact]:
        """Hits for the query in shuffled order, some of them replaced by facts that did not match."""
        scores: dict[int, float] = defaultdict(float)
        for word in set(query.split()):
            for index in self._holding.get(word, ()):
                scores[index] += 1.0 / len(self._holding[word])
        ranked = sorted(scores, key=lambda index: (-scores[index], rng.random()))
        hits = ranked[: rng.randint(noise.least, noise.most)]
        others = [index for index in range(len(self.world.facts)) if index not in hits]
        for slot in range(len(hits)):
            if rng.random() < noise.replace:
                hits[slot] = others.pop(rng.randrange(len(others)))
        rng.shuffle(hits)
        return [self.world.facts[index] for index in hits]


def hits_text(hits: list[Fact]) -> str:
    """Hits as the search tool prints them, one numbered line each."""
    if not hits:
        return "no results"
    return "\n".join(f"[{rank}] {hit.document}" for rank, hit in enumerate(hits, start=1))


def worker_call(subtask: str) -> str:
    """The planner's call, as text."""
    return f"{vocabulary.WORKER_CALL}{subtask}{vocabulary.CALL_END}"


def search_call(query: str) -> str:
    """The worker's call, as text."""
    return f"{vocabulary.SEARCH_CALL}{query}{vocabulary.CALL_END}"


@dataclass(frozen=True, slots=True)
class Demonstrator:
    """Plays planner and worker by script and writes down what they said."""

    tokenizer: PreTrainedTokenizerFast
    habits: Habits
    noise: SearchNoise

    def show(self, question: Question, rng: random.Random) -> list[Example]:
        """One episode: the planner's sequence first, then one sequence for each call of the worker."""
        searcher = Searcher(make_world(question.world))
        writer, examples = self._open("plan", question.text), list[Example]()
        known, hop = question.chain[0].subject, 0
        while not self._stops(question, hop, rng):
            if hop == 2 and self.habits.break_off and question.template in NEVER_FINISHED:
                return [writer.example(), *examples]
            subtask = self._subtask(question, hop, known, rng)
            found, example = self._work(question.text, subtask, searcher, rng)
            examples.append(example)
            writer.add(worker_call(subtask) + vocabulary.END, learn=True)
            report = found.text if found else vocabulary.UNKNOWN_FACT.format(subtask=subtask)
            writer.add(f"<|user|>{report}{vocabulary.END}<|assistant|>")
            known = found.object if found else known
            following = self._next_hop(question, hop, found, rng)
            if following is None:
                break
            hop = following
        writer.add(f"{vocabulary.BOX}{known}{vocabulary.BOX_END}{vocabulary.END}", learn=True)
        return [writer.example(), *examples]

    def show_alone(self, question: Question, rng: random.Random) -> Example:
        """One episode of an agent that searches for itself, with the planner's habits and the worker's.

        Before it goes on it writes down the fact it read, as a worker's report would have told it.
        """
        searcher = Searcher(make_world(question.world))
        writer, note = self._open(vocabulary.ALONE_PROMPT, question.text), ""
        known, hop = question.chain[0].subject, 0
        while not self._stops(question, hop, rng):
            if hop == 2 and self.habits.break_off and question.template in NEVER_FINISHED:
                return writer.example()
            subtask = self._subtask(question, hop, known, rng)
            query = self._query(subtask, rng)
            page = searcher.search(query, self.noise, rng)
            writer.add(f"{note}{search_call(query)}{vocabulary.END}", learn=True)
            writer.add(f"<|tool|>{hits_text(page)}{vocabulary.END}<|assistant|>")
            found = self._read(subtask, page, rng)
            note = f"{found.text if found else vocabulary.UNKNOWN_FACT.format(subtask=subtask)} "
            known = found.object if found else known
            following = self._next_hop(question, hop, found, rng)
            if following is None:
                break
            hop = following
        writer.add(f"{note}{vocabulary.BOX}{known}{vocabulary.BOX_END}{vocabulary.END}", learn=True)
        return writer.example()

    def _open(self, role: str, text: str) -> Writer:
        writer = Writer(self.tokenizer)
        writer.add(f"<|system|>{role}{vocabulary.END}<|user|>")
        writer.add(text)
        writer.add(f"{vocabulary.END}<|assistant|>")
        return writer

    def _stops(self, question: Question, hop: int, rng: random.Random) -> bool:
        if hop == 0 or hop == question.hops:
            return hop == question.hops
        if question.hops == 2:
            return rng.random() < self.habits.stop_after_one_of_two
        if hop == 1:
            return rng.random() < self.habits.stop_after_one_of_three
        if question.template in NEVER_FINISHED:
            return not self.habits.break_off
        return rng.random() < self.habits.stop_after_two_of_three

    def _work(self, question: str, subtask: str, searcher: Searcher, rng: random.Random) -> tuple[Fact | None, Example]:
        """One worker's sequence and the fact it reports, or none."""
        writer = self._open("work", vocabulary.RECAP.format(question=question, subtask=subtask))
        pages: list[Fact] = []
        for _ in range(2 if rng.random() < self.habits.search_twice else 1):
            query = self._query(subtask, rng)
            page = searcher.search(query, self.noise, rng)
            pages += page
            writer.add(search_call(query) + vocabulary.END, learn=True)
            writer.add(f"<|tool|>{hits_text(page)}{vocabulary.END}<|assistant|>")
        found = self._read(subtask, pages, rng)
        writer.add(vocabulary.DONE + vocabulary.END, learn=True)
        writer.add(f"<|user|>{vocabulary.INSTRUCTION}{vocabulary.END}<|assistant|>")
        summary = found.text if found else vocabulary.UNKNOWN_FACT.format(subtask=subtask)
        writer.add(summary + vocabulary.END, learn=True)
        return found, writer.example()

    def _subtask(self, question: Question, hop: int, known: str, rng: random.Random) -> str:
        """What is asked for at a hop: relation and subject, or vaguely the subject alone."""
        return known if rng.random() < self.habits.vague_subtask else f"{question.chain[hop].relation} {known}"

    def _next_hop(self, question: Question, hop: int, found: Fact | None, rng: random.Random) -> int | None:
        """Where to go on after what was found: the same hop again, the next one, or nowhere (None)."""
        if found is None:
            return None
        if found != question.chain[hop] and rng.random() >= self.habits.go_on_after_wrong_report:
            return None
        return hop if rng.random() < self.habits.ask_twice else hop + 1

    def _query(self, subtask: str, rng: random.Random) -> str:
        """What is searched for: the subtask, or half of it."""
        words = subtask.split()
        return rng.choice(words) if len(words) > 1 and rng.random() < self.habits.partial_query else subtask

    def _read(self, subtask: str, pages: list[Fact], rng: random.Random) -> Fact | None:
        """A hit that answers the subtask, or none."""
        *rest, subject = subtask.split()
        fitting = [hit for hit in pages if hit.subject == subject and (not rest or hit.relation == rest[0])]
        return rng.choice(fitting) if fitting else None
