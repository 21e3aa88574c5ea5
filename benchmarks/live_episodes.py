"""How many live episodes can one actor process drive? The real player, outbox, workflow, agents, conversations and a
byte-level tokenizer, against an engine and tools that only take time. An episode's ideal latency is the sum of what was
drawn for it; what it took longer is added latency. Finished episodes are replaced, so that memory is seen over
generations of them. `python -m benchmarks.live_episodes [--quick]`; the last line is one JSON object.

5,000 episodes whose answers take 2 s on average are 2,000 answers a second, more than a core that is shared with others
can take in; `--slowness` stretches all times (default 5: answers of 5-15 s, as of a busy server).
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import anyio
import numpy as np
import psutil
from pydantic import JsonValue
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from actors.engines.engine import EngineHealth, Generation, LoadReport
from actors.episode import play_episode
from actors.outbox import Outbox
from actors.play import Player
from actors.render import Renderer
from actors.scene import Stage
from actors.tools.plane import ToolResult, ToolSpec
from matpo.config import Config, Sampling
from matpo.datasets.world import documents
from protocols.messages import Lease, TreeUpload
from protocols.records import EpisodeTree, Task, Tokens
from protocols.weights import Weights

ENGINE_S, TOOL_S = (1.0, 3.0), (0.5, 2.0)
"""Bounds of a call's time before `--slowness`; uniform between them."""
ENGINE_CALLS, TOOL_CALLS = 11, 4
"""Of an episode, one after the other: planner asks a worker, reads its report, asks another, answers; each worker
searches twice, is done, and writes its report."""
GROUP = 8
VERSION = 7
VOCABULARY = 8_000
THINKING_WORDS, RESULT_CHARACTERS = 80, 1_800
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SYSTEM = " ".join(["Work out the answer step by step, check it against the documents, and say what you found."] * 12)


@dataclass(slots=True)
class Timetable:
    """One episode: what is left to be said in it, and how long what was drawn for it takes."""

    script: Iterator[Generation]
    ideal_s: float = 0.0


TIMETABLE: ContextVar[Timetable] = ContextVar("timetable")


@dataclass(slots=True)
class Tally:
    """What happened since the start."""

    calls: int = 0
    """Of the engine."""
    tokens: int = 0
    """Of finished trees."""
    added: list[tuple[float, float]] = field(default_factory=list)
    """Per finished episode: when it began (monotonic), and measured / ideal latency - 1."""


def tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on these texts, in ChatML."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([AddedToken(mark, special=True) for mark in ("<|im_start|>", "<|im_end|>", "<pad>")])
    build: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast
    return build(tokenizer_object=backend, chat_template=CHATML, eos_token="<|im_end|>", pad_token="<pad>")


def config(concurrency: int) -> Config:
    """A planner that asks two workers, each of which searches three times and writes a report."""
    return Config.model_validate(
        {
            "model": {"path": "unused"},
            "data": {"train": {"kind": "world"}, "evaluation": {"kind": "world"}},
            "actor": {"concurrency": concurrency, "engine": {"max_context_tokens": 16_384}},
            "episode": {
                "root": "planner",
                "roles": {
                    "planner": {"system": f"Plan. {SYSTEM}", "delegates": ["worker"], "max_context_tokens": 8_192},
                    "worker": {
                        "system": f"Work. {SYSTEM}",
                        "tools": ["search"],
                        "summary": "always",
                        "max_context_tokens": 8_192,
                    },
                },
            },
        }
    )


class StubEngine:
    """Takes its time and says the next message of the episode's script."""

    def __init__(self, tally: Tally, slowness: float) -> None:
        self.version = VERSION
        self.digests = {VERSION: "digest"}
        self._tally = tally
        self._slowness = slowness
        self._random = random.Random(0)

    async def generate(
        self, tokens: Tokens, sampling: Sampling, *, deadline_s: float, group: str = "", adapter: str | None = ""
    ) -> Generation:
        timetable, seconds = TIMETABLE.get(), self._random.uniform(*ENGINE_S) * self._slowness
        timetable.ideal_s += seconds
        await anyio.sleep(seconds)
        self._tally.calls += 1
        return next(timetable.script)

    async def load(self, weights: Weights, *, version: int, file: Path | None = None) -> LoadReport:
        raise NotImplementedError("the weights never change here")

    async def health(self) -> EngineHealth:
        return EngineHealth("ready", "stub", 0, 0, 0)


class StubTools:
    """One tool that takes its time and answers with a text nobody has seen before."""

    def __init__(self, words: Sequence[str], slowness: float) -> None:
        self._slowness = slowness
        self._random = random.Random(1)
        self._text = " ".join(self._random.choices(words, k=100_000))

    def specs(self, patterns: Sequence[str], *, hidden: frozenset[str] = frozenset()) -> Sequence[ToolSpec]:
        query: dict[str, JsonValue] = {"query": {"type": "string"}}
        schema: dict[str, JsonValue] = {"type": "object", "properties": query, "required": ["query"]}
        return [ToolSpec("search", "web", "search", "Search the web.", schema)] if "search" in patterns else []

    def episode(self) -> StubTools:
        return self

    def close(self) -> None:
        return

    async def call(
        self, name: str, arguments: Mapping[str, JsonValue], *, fixed: Mapping[str, JsonValue]
    ) -> ToolResult:
        seconds = self._random.uniform(*TOOL_S) * self._slowness
        TIMETABLE.get().ideal_s += seconds
        await anyio.sleep(seconds)
        start = self._random.randrange(len(self._text) - RESULT_CHARACTERS)
        text = self._text[start : start + RESULT_CHARACTERS]
        return ToolResult(text, "ok", "web", "search", seconds, len(text))


class Scripts:
    """What the policy says in an episode; a few hundred different messages, said over and over."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, words: Sequence[str]) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._words = words
        self._random = random.Random(2)
        self._asks = [self._call("worker", "subtask") for _ in range(100)]
        self._searches = [self._call("search", "query") for _ in range(100)]
        self._reports = [self._message(f"The report: {self._some(60)}") for _ in range(100)]
        self._answers = [self._message("\\boxed{Ann}") for _ in range(100)]

    def draw(self) -> Iterator[Generation]:
        """The messages of one episode, in order."""
        choose = self._random.choice
        for _ in range(2):
            yield choose(self._asks)
            yield choose(self._searches)
            yield choose(self._searches)
            yield choose(self._reports)
            yield choose(self._reports)
        yield choose(self._answers)

    def _some(self, count: int) -> str:
        return " ".join(self._random.choices(self._words, k=count))

    def _call(self, name: str, argument: str) -> Generation:
        return self._message(
            f'<tool_call>{{"name": "{name}", "arguments": {{"{argument}": "{self._some(12)}"}}}}</tool_call>'
        )

    def _message(self, text: str) -> Generation:
        ids: list[int] = self._backend.encode(f"<think>{self._some(THINKING_WORDS)}</think>{text}").ids
        tokens = np.array([*ids, self._backend.token_to_id("<|im_end|>")], dtype=np.int32)
        logprobs = np.full(len(tokens), -0.5, dtype=np.float32)
        return Generation(tokens, logprobs, np.full(len(tokens), VERSION, dtype=np.int32), "stop")


class AlwaysThere:
    """A hub that has every tree the moment it is sent."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    async def send(self, message: TreeUpload, frames: Sequence[bytes] = ()) -> bool:
        self._outbox.acknowledge(message.tree_id)
        return True

    async def wait_connected(self) -> None:
        return


@dataclass(frozen=True)
class Plan:
    """How many episodes at once, how slow they are, and how long to watch."""

    episodes: int
    slowness: float
    generations: float

    @property
    def mean_episode_s(self) -> float:
        return (ENGINE_CALLS * sum(ENGINE_S) / 2 + TOOL_CALLS * sum(TOOL_S) / 2) * self.slowness

    @property
    def seconds(self) -> float:
        return self.generations * self.mean_episode_s


@dataclass(frozen=True)
class Seen:
    """One run, after its start-up."""

    finished: int
    added_median: float
    added_p99: float
    cpu_us_per_call: float
    calls_per_s: float
    busy: float
    """CPU seconds per second."""
    rss_mb: tuple[float, ...]
    """Once a second."""
    tokens_per_episode: float

    def rss_at(self, share: float) -> float:
        """Mean over a tenth of the run that ends (or begins) there."""
        tenth = max(1, len(self.rss_mb) // 10)
        return statistics.fmean(self.rss_mb[:tenth] if share == 0 else self.rss_mb[-tenth:])


async def run(plan: Plan) -> Seen:
    """Fill up over the length of one episode, so that episodes are in all stages; then watch."""
    words = " ".join(text for seed in range(20) for _, text in documents(seed)).split()
    chat, tally = tokenizer([" ".join(words)]), Tally()
    scripts = Scripts(chat, words)
    stage = Stage(
        config(plan.episodes),
        engine=StubEngine(tally, plan.slowness),
        tools=StubTools(words, plan.slowness),
        renderer=Renderer(chat),
        actor_id="actor-0",
    )

    async def play(lease: Lease, episode: int) -> EpisodeTree:
        timetable, began = Timetable(scripts.draw()), time.monotonic()
        TIMETABLE.set(timetable)
        tree = await play_episode(
            lease.task,
            lease_id=lease.lease_id,
            group_id=lease.group_id,
            episode=episode,
            purpose="train",
            stage=stage,
        )
        assert tree.reward is not None and next(timetable.script, None) is None
        tally.tokens += tree.token_count
        tally.added.append((began, (time.monotonic() - began) / timetable.ideal_s - 1))
        return tree

    leases = (lease_of(number) for number in count())
    with tempfile.TemporaryDirectory() as folder, Outbox.open(Path(folder), limit_trees=2_000) as outbox:
        player = Player(play, version=lambda: VERSION, store=outbox, concurrency=plan.episodes)

        async def replace() -> None:
            while True:
                while player.wanted >= GROUP:
                    player.take(next(leases))
                await player.wait_changed()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(player.run)
            tasks.start_soon(outbox.upload, AlwaysThere(outbox))
            for _ in range(plan.episodes // GROUP):
                player.take(next(leases))
                await anyio.sleep(plan.mean_episode_s / (plan.episodes // GROUP))
            tasks.start_soon(replace)
            seen = await watch(plan, tally)
            tasks.cancel_scope.cancel()
    return seen


async def watch(plan: Plan, tally: Tally) -> Seen:
    """Look on for the time of the plan."""
    gc.collect()
    process, rss = psutil.Process(), []
    began, cpu, calls = time.monotonic(), time.process_time(), tally.calls
    while time.monotonic() < began + plan.seconds:
        rss.append(process.memory_info().rss / 1e6)
        await anyio.sleep(1)
    calls, cpu, seconds = tally.calls - calls, time.process_time() - cpu, time.monotonic() - began
    added = sorted(share for start, share in tally.added if start >= began)
    return Seen(
        finished=len(added),
        added_median=statistics.median(added),
        added_p99=added[int(0.99 * len(added))],
        cpu_us_per_call=cpu / calls * 1e6,
        calls_per_s=calls / seconds,
        busy=cpu / seconds,
        rss_mb=tuple(rss),
        tokens_per_episode=tally.tokens / len(tally.added),
    )


def lease_of(number: int) -> Lease:
    return Lease(
        lease_id=f"lease-{number}",
        group_id=f"group-{number}",
        task=Task.make(f"Who is number {number}, and what did they build?", ("Ann",)),
        episodes=tuple(range(GROUP)),
        purpose="train",
        min_version=0,
        expires_s=600,
    )


def main() -> int:
    """Measure few and many, print the table, print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="400 episodes at a third of the times; under a minute")
    parser.add_argument("--episodes", type=int, default=5_000)
    parser.add_argument("--slowness", type=float, default=5.0, help="factor on all times")
    parser.add_argument("--generations", type=float, default=2.0, help="how long to watch, in mean episodes")
    options = parser.parse_args()
    slowness = 0.35 if options.quick else options.slowness
    plans = (
        Plan(episodes=48, slowness=0.35, generations=1.4),
        Plan(400 if options.quick else options.episodes, slowness, 1.5 if options.quick else options.generations),
    )
    runs = [anyio.run(run, plan, backend_options={"use_uvloop": True}) for plan in plans]
    print(
        f"{'live':>6}{'finished':>10}{'added':>8}{'p99':>8}{'calls/s':>9}{'CPU µs/call':>13}{'busy':>6}{'RSS MB':>15}"
    )
    for plan, seen in zip(plans, runs, strict=True):
        print(
            f"{plan.episodes:>6}{seen.finished:>10}{seen.added_median:>8.2%}{seen.added_p99:>8.2%}{seen.calls_per_s:>9.0f}"
            f"{seen.cpu_us_per_call:>13.0f}{seen.busy:>6.2f}{seen.rss_at(0):>16.0f}{seen.rss_at(1):>5.0f}"
        )
    few, many = runs
    figures = {
        "episodes": plans[1].episodes,
        "added_latency": round(many.added_median, 4),
        "added_latency_p99": round(many.added_p99, 4),
        "added_latency_few": round(few.added_median, 4),
        "rss_mb_start": round(many.rss_at(0)),
        "rss_mb_end": round(many.rss_at(1)),
        "cpu_us_per_call": round(many.cpu_us_per_call, 1),
        "cpu_us_per_call_few": round(few.cpu_us_per_call, 1),
        "calls_per_s": round(many.calls_per_s),
        "tokens_per_episode": round(many.tokens_per_episode),
        "finished": many.finished,
    }
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
