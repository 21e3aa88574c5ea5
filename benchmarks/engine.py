"""Sampled tokens per second of the embedded engine beside transformers' own `generate` and, with `--sglang PYTHON`, a
real SGLang server on the CPU: same weights, same prompts, same sampled lengths, one thread each, rounds interleaved.

Then whole episodes, a planner that asks workers, with and without the reuse of prefixes. Rates are per CPU second of
every process that works (of a server: all of its processes), and by the wall. Engines also record a log-probability and
a version per token; `generate` does not. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import anyio
import numpy as np
import psutil
import torch
from pydantic import JsonValue
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, GenerationMixin

from actors.engines.embedded.engine import TORCH_TYPES, EmbeddedEngine
from actors.engines.engine import Engine
from actors.engines.folder import read_model_weights
from actors.engines.sglang.engine import SglangEngine
from benchmarks.runs import ROOT, print_result
from matpo.config import EmbeddedEngine as EmbeddedSettings
from matpo.config import Sampling
from matpo.config import SglangEngine as SglangSettings
from protocols.records import Tokens

PROMPT_TOKENS = 64
LIMIT_S = 600.0
GROUP, TURNS, SEARCHES = 8, 3, 2
"""Episodes of a group; turns of the planner, each answered by a worker; searches of a worker."""
SYSTEM_TOKENS, QUESTION_TOKENS, MESSAGE_TOKENS, RESULT_TOKENS = 12, 14, 8, 30
CONCURRENCY = 64
EPISODE_CONTEXT = 256

Kind = Literal["embedded", "transformers", "sglang"]
Run = Callable[[list[Tokens], int], Awaitable[None]]
"""Samples so many tokens after each of the prompts, all together."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured."""

    folder: Path
    vocabulary: int
    dtype: Literal["float32", "bfloat16"]
    batches: tuple[int, ...]
    new_tokens: int
    rounds: int
    groups: int
    sglang: Path | None

    @property
    def context(self) -> int:
        return PROMPT_TOKENS + self.new_tokens + 16

    def prompts(self, count: int, length: int, *, seed: int) -> list[Tokens]:
        draw = np.random.default_rng(seed)
        return [draw.integers(0, self.vocabulary, length).astype(np.int32) for _ in range(count)]


@dataclass(frozen=True, slots=True)
class Speed:
    """Sampled tokens, or episodes, by CPU time and by the wall."""

    per_cpu_second: float
    per_second: float


class Clock:
    """Wall and CPU time since it was made; with `children`, the CPU time of all processes below this one too."""

    def __init__(self, *, children: bool = False) -> None:
        self._children = children
        self._cpu, self._wall = self._cpu_s(), time.perf_counter()

    def speed(self, done: int) -> Speed:
        wall = time.perf_counter() - self._wall
        return Speed(done / (self._cpu_s() - self._cpu), done / wall)

    def _cpu_s(self) -> float:
        below = psutil.Process().children(recursive=True) if self._children else []
        times = [process.cpu_times() for process in below]
        return time.process_time() + sum(t.user + t.system for t in times)


async def generate_all(engine: Engine, batch: list[Tokens], new_tokens: int) -> None:
    async with anyio.create_task_group() as tasks:
        for tokens in batch:
            tasks.start_soon(sample, engine, tokens, new_tokens)


async def sample(engine: Engine, tokens: Tokens, count: int, group: str = "") -> Tokens:
    answer = await engine.generate(tokens, Sampling(max_tokens=count), deadline_s=LIMIT_S, group=group)
    if len(answer.tokens) != count:
        raise RuntimeError(f"{len(answer.tokens)} tokens instead of {count}")
    return answer.tokens


@asynccontextmanager
async def open_embedded(plan: Plan, *, rows: int, context: int, kept: int | None = None) -> AsyncIterator[Engine]:
    settings = EmbeddedSettings(max_batch=rows, max_context_tokens=context, dtype=plan.dtype, prefix_cache_tokens=kept)
    async with EmbeddedEngine.open(plan.folder, settings, seed=0) as engine:
        await engine.load(read_model_weights(plan.folder), version=0)
        yield engine


@asynccontextmanager
async def open_sglang(plan: Plan, python: Path, log: Path) -> AsyncIterator[Engine]:
    settings = SglangSettings(
        python=str(python),
        device="cpu",
        dtype=plan.dtype,
        max_batch=max(plan.batches),
        max_context_tokens=plan.context,
        arguments=("--sleep-on-idle",),
    )
    async with SglangEngine.open(plan.folder, settings, seed=0, log=log) as engine:
        await engine.load(read_model_weights(plan.folder), version=0)
        yield engine


def transformers_generate(plan: Plan) -> Run:
    """One call of `generate` for a whole batch."""
    model = AutoModelForCausalLM.from_pretrained(plan.folder, dtype=TORCH_TYPES[plan.dtype])
    generate: Callable[..., object] = GenerationMixin.generate

    async def run(batch: list[Tokens], new_tokens: int) -> None:
        inputs = torch.from_numpy(np.stack(batch)).long()
        generate(
            model,
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=True,
            top_k=0,
            max_new_tokens=new_tokens,
            pad_token_id=0,
        )

    return run


async def measure_batches(plan: Plan, log: Path) -> dict[tuple[Kind, int], list[Speed]]:
    """Every engine at every batch size, in turns; each round has prompts of its own."""
    speeds: dict[tuple[Kind, int], list[Speed]] = {}
    async with AsyncExitStack() as stack:
        runs: dict[Kind, Run] = {"transformers": transformers_generate(plan)}
        if plan.sglang is not None:
            server = await stack.enter_async_context(open_sglang(plan, plan.sglang, log))
            runs["sglang"] = partial(generate_all, server)
        for batch in plan.batches:
            async with open_embedded(plan, rows=batch, context=plan.context) as engine:
                runs["embedded"] = partial(generate_all, engine)
                for number in range(-1, plan.rounds):  # the first warms up
                    count = plan.new_tokens if number >= 0 else 4
                    for kind, run in runs.items():
                        prompts = plan.prompts(batch, PROMPT_TOKENS, seed=number + 1)
                        clock = Clock(children=kind == "sglang")
                        await run(prompts, count)
                        if number >= 0:
                            speeds.setdefault((kind, batch), []).append(clock.speed(batch * count))
    return speeds


async def measure_episodes(plan: Plan, *, kept: int | None) -> tuple[Speed, float]:
    """Episodes per second, 64 at once, and the share of prompt tokens that needed no computing."""
    draw = np.random.default_rng(0)
    planner, worker = (draw.integers(0, plan.vocabulary, SYSTEM_TOKENS).astype(np.int32) for _ in range(2))
    limiter = anyio.CapacityLimiter(CONCURRENCY)

    async def talk(start: Tokens, turns: int, answer: Callable[[Tokens], Awaitable[Tokens]]) -> Tokens:
        """Messages of one agent, each followed by what it is told; returns the last."""
        tokens = start
        for _ in range(turns):
            said = await sample(engine, tokens, MESSAGE_TOKENS)
            tokens = np.concatenate([tokens, said, await answer(said)])
        return await sample(engine, tokens, MESSAGE_TOKENS)

    async def search(_: Tokens) -> Tokens:
        return draw.integers(0, plan.vocabulary, RESULT_TOKENS).astype(np.int32)

    async def play(question: Tokens) -> None:
        async with limiter:
            await talk(
                np.concatenate([planner, question]),
                TURNS,
                lambda task: talk(np.concatenate([worker, question, task]), SEARCHES, search),
            )

    async with open_embedded(plan, rows=CONCURRENCY, context=EPISODE_CONTEXT, kept=kept) as engine:
        clock = Clock()
        async with anyio.create_task_group() as tasks:
            for question in plan.prompts(plan.groups, QUESTION_TOKENS, seed=1):
                for _ in range(GROUP):
                    tasks.start_soon(play, question)
        speed, health = clock.speed(plan.groups * GROUP), await engine.health()
    return speed, health.cached_tokens / health.prompt_tokens


async def measure_reuse(plan: Plan, console: Console) -> dict[str, JsonValue]:
    """The same episodes with and without reuse, in turns."""
    with_reuse, without, rates = [], [], []
    for _ in range(plan.rounds):
        speed, rate = await measure_episodes(plan, kept=None)
        with_reuse.append(speed)
        rates.append(rate)
        without.append((await measure_episodes(plan, kept=0))[0])
    speedup = median(a.per_cpu_second / b.per_cpu_second for a, b in zip(with_reuse, without, strict=True))
    result: dict[str, JsonValue] = {
        "episodes_per_cpu_s": round(median(s.per_cpu_second for s in with_reuse), 1),
        "episodes_per_cpu_s_without_reuse": round(median(s.per_cpu_second for s in without), 1),
        "reuse_speedup": round(speedup, 2),
        "prefix_hit_rate": round(median(rates), 3),
    }
    console.print(
        f"episodes of {1 + 2 * TURNS} conversations, groups of {GROUP}, {CONCURRENCY} at once: {result}", soft_wrap=True
    )
    return result


def show(plan: Plan, speeds: dict[tuple[Kind, int], list[Speed]], console: Console) -> dict[str, JsonValue]:
    """The table, and its figures: medians, and ratios within each round."""
    table = Table("batch", "engine", "tok/cpu-s", "tok/s", "ours is faster by (cpu)", "(wall)")
    figures: dict[str, JsonValue] = {}
    for (kind, batch), theirs in speeds.items():
        ours = speeds["embedded", batch]
        cpu = median(a.per_cpu_second / b.per_cpu_second for a, b in zip(ours, theirs, strict=True))
        wall = median(a.per_second / b.per_second for a, b in zip(ours, theirs, strict=True))
        rates = median(s.per_cpu_second for s in theirs), median(s.per_second for s in theirs)
        figures |= {f"{kind}_{batch}": round(rates[0]), f"{kind}_{batch}_wall": round(rates[1])}
        if kind != "embedded":
            figures |= {f"ratio_{kind}_{batch}": round(cpu, 2), f"ratio_{kind}_{batch}_wall": round(wall, 2)}
        table.add_row(str(batch), kind, f"{rates[0]:,.0f}", f"{rates[1]:,.0f}", f"{cpu:.2f}", f"{wall:.2f}")
    console.print(f"{PROMPT_TOKENS} + {plan.new_tokens} tokens, {plan.dtype}, {plan.rounds} rounds")
    console.print(table)
    return figures


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="fewer tokens and rounds; within a minute without --sglang"
    )
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "quickstart", help="Hugging Face folder")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--new-tokens", type=int, help="sampled per prompt (192, or 48 with --quick)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, help="5, or 3 with --quick")
    parser.add_argument("--sglang", type=Path, metavar="PYTHON", help="of `make sglang-cpu`: .venv-sglang/bin/python")
    parser.add_argument("--no-episodes", action="store_true", help="leave the episodes out")
    return parser.parse_args(arguments)


def main() -> None:
    given = parse()
    torch.set_num_threads(1)
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        plan = Plan(
            folder=folder,
            vocabulary=without_end_tokens(given.model, folder),
            dtype=given.dtype,
            batches=tuple(given.batches),
            new_tokens=given.new_tokens or (48 if given.quick else 192),
            rounds=given.rounds or (3 if given.quick else 5),
            groups=12 if given.quick else 32,
            sglang=given.sglang,
        )
        figures: dict[str, JsonValue] = {"model": given.model.name, "dtype": plan.dtype, "cores": os.cpu_count()}
        figures |= show(plan, anyio.run(measure_batches, plan, Path(name) / "sglang.log"), console)
        if not given.no_episodes:
            figures |= anyio.run(measure_reuse, plan, console)
    print_result(figures)


def without_end_tokens(folder: Path, copy: Path) -> int:
    """Copy a model folder so that nobody stops early. Returns the vocabulary's size."""
    shutil.copytree(folder, copy)
    (copy / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    return int(config["vocab_size"])


if __name__ == "__main__":
    main()
