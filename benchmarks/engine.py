"""Sampled tokens per second of the embedded engine beside transformers' own `generate`, on one thread of this machine.

A random Qwen3 of hidden size 128 and 4 layers (0.9M parameters), 64-token prompts, temperature 1. The engine also
records a log-probability and a version per token; `generate` does not. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anyio
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import GenerationMixin, Qwen3Config, Qwen3ForCausalLM

from actors.engines.embedded.engine import EmbeddedEngine
from matpo.config import EmbeddedEngine as EmbeddedSettings
from matpo.config import Sampling
from protocols.records import Tokens
from protocols.weights import read_keyframe

VOCABULARY = 1200
PROMPT_TOKENS = 64
TURNS, TURN_TOKENS, RESULT_TOKENS = 6, 8, 25
"""The multi-turn part: as in the quick start, short turns over a growing context."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens sampled by one engine at one batch size."""

    per_second: float
    per_cpu_second: float


class Clock:
    """Wall and CPU time (of all threads) since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def speed(self, tokens: int) -> Speed:
        return Speed(tokens / (time.perf_counter() - self._wall), tokens / (time.process_time() - self._cpu))


def make_model(folder: Path) -> Qwen3ForCausalLM:
    """The random model, also written to `folder`."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    build: Callable[[Qwen3Config], Qwen3ForCausalLM] = Qwen3ForCausalLM
    model = build(config)
    model.save_pretrained(folder)
    return model


def prompts(count: int, tokens: int) -> list[Tokens]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, VOCABULARY, tokens).astype(np.int32) for _ in range(count)]


def measure_transformers(model: Qwen3ForCausalLM, batch: int, new_tokens: int) -> Speed:
    """One call of `generate` for the whole batch."""
    generate: Callable[..., object] = GenerationMixin.generate
    inputs = torch.from_numpy(np.stack(prompts(batch, PROMPT_TOKENS))).long()
    mask = torch.ones_like(inputs)
    generate(model, inputs, attention_mask=mask, do_sample=True, max_new_tokens=2)
    clock = Clock()
    generate(model, inputs, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=new_tokens)
    return clock.speed(batch * new_tokens)


async def measure_embedded(folder: Path, batch: int, new_tokens: int) -> Speed:
    """The same work as `batch` concurrent requests."""
    settings = EmbeddedSettings(max_batch=batch, max_context_tokens=512)
    async with EmbeddedEngine.open(folder, settings, seed=0) as engine:
        await engine.load(read_keyframe(folder / "model.safetensors"), version=0)
        await generate_all(engine, prompts(batch, 8), 2)
        clock = Clock()
        await generate_all(engine, prompts(batch, PROMPT_TOKENS), new_tokens)
        return clock.speed(batch * new_tokens)


async def generate_all(engine: EmbeddedEngine, requests: list[Tokens], new_tokens: int) -> None:
    sampling = Sampling(max_tokens=new_tokens)
    async with anyio.create_task_group() as tasks:
        for tokens in requests:
            tasks.start_soon(generate_one, engine, tokens, sampling)


async def generate_one(engine: EmbeddedEngine, tokens: Tokens, sampling: Sampling) -> Tokens:
    return (await engine.generate(tokens, sampling, deadline_s=600)).tokens


async def measure_episodes(folder: Path, concurrency: int, episodes: int) -> Speed:
    """Multi-turn episodes: every turn extends the last one's tokens, whose keys and values are still there."""
    settings = EmbeddedSettings(max_batch=concurrency, max_context_tokens=512)
    limiter = anyio.CapacityLimiter(concurrency)

    async def play(start: Tokens, result: Tokens) -> None:
        async with limiter:
            tokens = start
            for _ in range(TURNS):
                sampled = await generate_one(engine, tokens, Sampling(max_tokens=TURN_TOKENS))
                tokens = np.concatenate([tokens, sampled, result])

    async with EmbeddedEngine.open(folder, settings, seed=0) as engine:
        await engine.load(read_keyframe(folder / "model.safetensors"), version=0)
        clock = Clock()
        async with anyio.create_task_group() as tasks:
            for start, result in zip(prompts(episodes, 32), prompts(episodes, RESULT_TOKENS), strict=True):
                tasks.start_soon(play, start, result)
        return clock.speed(episodes * TURNS * TURN_TOKENS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens; within 50 s")
    quick: bool = parser.parse_args().quick
    torch.set_num_threads(1)
    batches, new_tokens = (1, 8, 32, 128), 48 if quick else 192
    table = Table("batch", "embedded tok/s", "tok/cpu-s", "generate tok/s", "tok/cpu-s", "ratio (cpu)")
    figures: dict[str, float] = {"quick": float(quick), "cores": float(os.cpu_count() or 1)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder)
        for batch in batches:
            ours = anyio.run(measure_embedded, folder, batch, new_tokens)
            theirs = measure_transformers(model, batch, new_tokens)
            ratio = ours.per_cpu_second / theirs.per_cpu_second
            speeds = (ours.per_second, ours.per_cpu_second, theirs.per_second, theirs.per_cpu_second)
            table.add_row(str(batch), *(f"{speed:,.0f}" for speed in speeds), f"{ratio:.1f}")
            figures |= {
                f"embedded_{batch}": round(ours.per_cpu_second),
                f"transformers_{batch}": round(theirs.per_cpu_second),
            }
        turns = anyio.run(measure_episodes, folder, 64, 128 if quick else 512)
    console = Console()
    console.print(table)
    each = TURNS * TURN_TOKENS
    console.print(
        f"episodes of {TURNS} turns ({TURN_TOKENS} sampled + {RESULT_TOKENS} new tokens each), 64 at once:"
        f" {turns.per_second / each:,.0f} episodes/s, {turns.per_cpu_second:,.0f} sampled tok/cpu-s"
    )
    figures |= {"episodes_per_s": round(turns.per_second / each, 1), "multi_turn": round(turns.per_cpu_second)}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
