"""Planner and worker episodes of the quick start in one process, and what is measured on them.

The same message flow as the actors', over the simulated search of `demos`, so that the warm start can be judged where
it is made. An episode is a generator that yields requests and is sent completions; `play` drives many in lockstep.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from learner.warmstart import vocabulary
from learner.warmstart.demos import Searcher, SearchNoise, hits_text
from learner.warmstart.fit import encode
from learner.warmstart.sampler import Completion, Request, Sampler
from matpo.datasets.world import Fact, Question, make_world

PLANNER_TURNS = 6
WORKER_TURNS = 3
MAX_NEW_TOKENS = 10
CONTEXT_TOKENS = 160

_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>")
_BOX = re.compile(r"\\boxed\{([^{}]*)\}")


@dataclass(slots=True)
class Played:
    """One agent's token sequence: which tokens it chose, and with what log-probability (0 where given)."""

    role: str
    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    calls: int = 0
    bad_calls: int = 0

    def given(self, tokens: Sequence[int]) -> None:
        """Appends tokens the agent did not choose."""
        self.tokens += tokens
        self.sampled += [False] * len(tokens)
        self.logprobs += [0.0] * len(tokens)

    def chosen(self, completion: Completion) -> None:
        """Appends tokens the agent chose."""
        self.tokens += completion.tokens
        self.sampled += [True] * len(completion.tokens)
        self.logprobs += completion.logprobs

    @property
    def format(self) -> float:
        """Share of well-formed, allowed calls; 1 without any call."""
        return 1.0 - self.bad_calls / self.calls if self.calls else 1.0


@dataclass(frozen=True, slots=True)
class Reading:
    """One worker whose subtask names a fact: was that fact among its hits, was it the first, was it reported?"""

    present: bool
    first: bool
    right: bool
    said_nothing: bool


@dataclass(slots=True)
class Episode:
    """What one episode left: the planner's sequence first, then the workers'."""

    question: Question
    played: list[Played]
    answer: str | None = None
    readings: list[Reading] = field(default_factory=list)

    @property
    def correct(self) -> bool:
        """Exact match."""
        return self.answer == self.question.answer

    @property
    def format(self) -> float:
        """Half the planner's, half the workers' mean (0 where no worker was called)."""
        workers = [played.format for played in self.played[1:]]
        return 0.5 * self.played[0].format + 0.5 * (sum(workers) / len(workers) if workers else 0.0)

    @property
    def reward(self) -> float:
        """MATPO's rule: 0.9 answer and 0.1 format."""
        return 0.9 * self.correct + 0.1 * self.format


Turns = Generator[Request, Completion, Episode]


@dataclass(slots=True)
class _Agent:
    """One conversation: sends text, gets text."""

    tokenizer: PreTrainedTokenizerFast
    row: int
    played: Played

    def say(self, text: str) -> Generator[Request, Completion, str]:
        chunk = encode(self.tokenizer, text)
        fresh = not self.played.tokens
        self.played.given(chunk)
        completion = yield Request(self.row, tuple(chunk), fresh)
        self.played.chosen(completion)
        return str(self.tokenizer.decode(list(completion.tokens)))

    def call(self, reply: str, tool: str, argument: str) -> str | None:
        """The argument of the one allowed call in ``reply``; a malformed call is counted and gives none."""
        found = _CALL.search(reply)
        if found is None:
            attempted = "tool_call>" in reply
            self.played.calls += attempted
            self.played.bad_calls += attempted
            return None
        self.played.calls += 1
        try:
            call = json.loads(found[1])
            if call["name"] == tool:
                return str(call["arguments"][argument]).strip()
        except (ValueError, KeyError, TypeError):
            pass
        self.played.bad_calls += 1
        return None


def message(role: str, content: str) -> str:
    """One message and the opening of the assistant's reply."""
    return f"<|{role}|>{content}{vocabulary.END}<|assistant|>"


def opening(role: str, content: str) -> str:
    """System prompt, first user message, and the opening of the reply."""
    return f"<|system|>{role}{vocabulary.END}{message('user', content)}"


@dataclass(frozen=True, slots=True)
class Player:
    """Makes episodes; ``noise`` is the search tool's."""

    tokenizer: PreTrainedTokenizerFast
    noise: SearchNoise

    def episode(self, question: Question, rows: tuple[int, int], rng: random.Random) -> Turns:
        """The planner on row ``rows[0]``, each of its workers afresh on ``rows[1]``."""
        episode = Episode(question, [Played("planner")])
        planner = _Agent(self.tokenizer, rows[0], episode.played[0])
        searcher = Searcher(make_world(question.world))
        text = opening(vocabulary.PLANNER_PROMPT, question.text)
        for _ in range(PLANNER_TURNS):
            reply = yield from planner.say(text)
            subtask = planner.call(reply, "worker", "subtask")
            if subtask is None:
                boxed = _BOX.findall(reply)
                episode.answer = boxed[-1].strip() if boxed else None
                break
            report = yield from self._work(episode, subtask, searcher, rows[1], rng)
            text = message("user", report)
        return episode

    def _work(
        self, episode: Episode, subtask: str, searcher: Searcher, row: int, rng: random.Random
    ) -> Generator[Request, Completion, str]:
        worker = _Agent(self.tokenizer, row, Played("worker"))
        episode.played.append(worker.played)
        pages: list[list[Fact]] = []
        recap = vocabulary.RECAP.format(question=episode.question.text, subtask=subtask)
        text = opening(vocabulary.WORKER_PROMPT, recap)
        for _ in range(WORKER_TURNS):
            reply = yield from worker.say(text)
            query = worker.call(reply, "search", "query")
            if query is None:
                break
            pages.append(searcher.search(query, self.noise, rng))
            text = message("tool", hits_text(pages[-1]))
        if not reply.rstrip().endswith(vocabulary.END):
            worker.played.given(encode(self.tokenizer, vocabulary.END))
        tail = text if query is not None else ""
        reply = yield from worker.say(tail.removesuffix("<|assistant|>") + message("user", vocabulary.INSTRUCTION))
        report = reply.replace(vocabulary.END, "").strip()
        wanted = next((fact for fact in searcher.world.facts if fact.key == subtask), None)
        if wanted is not None and pages:
            present = any(wanted in page for page in pages)
            first = any(page[:1] == [wanted] for page in pages)
            nothing = report == vocabulary.UNKNOWN_FACT.format(subtask=subtask)
            episode.readings.append(Reading(present, first, report == wanted.text, nothing))
        return report


def play(
    player: Player, model: Qwen3ForCausalLM, questions: Sequence[Question], *, temperature: float, seed: int
) -> list[Episode]:
    """One episode per question, all in lockstep."""
    rng = random.Random(f"play-{seed}")
    [end] = encode(player.tokenizer, vocabulary.END)
    sampler = Sampler(model, rows=2 * len(questions), length=CONTEXT_TOKENS, max_new=MAX_NEW_TOKENS, end=end, seed=seed)
    turns = [player.episode(question, (2 * i, 2 * i + 1), rng) for i, question in enumerate(questions)]
    waiting = {i: next(turn) for i, turn in enumerate(turns)}
    finished: dict[int, Episode] = {}
    while waiting:
        completions = sampler.sample(list(waiting.values()), temperature)
        for i, completion in zip(list(waiting), completions, strict=True):
            try:
                waiting[i] = turns[i].send(completion)
            except StopIteration as stop:
                del waiting[i]
                finished[i] = stop.value
    return [finished[i] for i in range(len(questions))]
