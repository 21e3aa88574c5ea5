"""What weight updates cost a generating engine: tokens per second with an update every few seconds against none, in
alternating phases of one run, and how long each update keeps the engine from sampling. The embedded engine, and with
`--sglang` a real SGLang server on the CPU (`make sglang-cpu`) in its modes `retract` and `in_place`.
`python -m benchmarks.swap [--quick] [--sglang]`; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import anyio
import numpy as np
import psutil

from actors.engines.embedded.engine import EmbeddedEngine
from actors.engines.engine import Engine
from actors.engines.sglang.engine import SglangEngine
from actors.engines.sglang.launch import free_port, launched
from benchmarks.runs import ROOT
from matpo.config import EmbeddedEngine as EmbeddedSettings
from matpo.config import Sampling
from matpo.config import SglangEngine as SglangSettings
from protocols.records import Tokens
from protocols.weights import Tensor, Weights, read_keyframe, write_keyframe

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
SWAPS: Final[Sequence[Literal["retract", "in_place"]]] = ("retract", "in_place")
EVERY_S = 2.5
"""Seconds from one update to the next: steps far shorter than real ones."""
AT_ONCE = 32
PROMPT_TOKENS, SAMPLED_TOKENS = 48, (32, 96)


@dataclass
class Seen:
    """One engine's phases, in pairs without and with updates."""

    calm: list[float] = field(default_factory=list)
    """Tokens per second."""
    updated: list[float] = field(default_factory=list)
    calm_cpu: list[float] = field(default_factory=list)
    """Tokens per CPU second of everything that takes part."""
    updated_cpu: list[float] = field(default_factory=list)
    pauses_s: list[float] = field(default_factory=list)
    loads_s: list[float] = field(default_factory=list)
    """From the call of `load` to its end; the engine samples for most of it."""

    def figures(self, name: str) -> dict[str, float]:
        return {
            f"{name}_ratio": round(_ratio(self.updated, self.calm), 3),
            f"{name}_cpu_ratio": round(_ratio(self.updated_cpu, self.calm_cpu), 3),
            f"{name}_tokens_per_s": round(statistics.median(self.calm)),
            f"{name}_updates": len(self.pauses_s),
            f"{name}_pause_ms_median": round(statistics.median(self.pauses_s) * 1e3, 1),
            f"{name}_pause_ms_mean": round(statistics.fmean(self.pauses_s) * 1e3, 1),
            f"{name}_pause_ms_max": round(max(self.pauses_s) * 1e3, 1),
            f"{name}_pause_share": round(statistics.median(self.pauses_s) / EVERY_S, 4),
            f"{name}_load_ms_median": round(statistics.median(self.loads_s) * 1e3, 1),
        }


def _ratio(updated: Sequence[float], calm: Sequence[float]) -> float:
    """Median over the pairs: the two of a pair ran one right after the other."""
    return statistics.median(one / other for one, other in zip(updated, calm, strict=True))


class Load:
    """Requests without end, a fixed number of them at once, of different lengths."""

    def __init__(self, engine: Engine, vocabulary: int) -> None:
        self.tokens = 0
        """Sampled, of requests that are answered."""
        self._engine = engine
        self._draw = np.random.default_rng(0)
        self._vocabulary = vocabulary

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            for _ in range(AT_ONCE):
                tasks.start_soon(self._one_after_the_other)

    async def _one_after_the_other(self) -> None:
        while True:
            prompt: Tokens = self._draw.integers(0, self._vocabulary, PROMPT_TOKENS).astype(np.int32)
            sampling = Sampling(max_tokens=int(self._draw.integers(*SAMPLED_TOKENS)))
            generation = await self._engine.generate(prompt, sampling, deadline_s=120)
            self.tokens += len(generation.tokens)


class Updates:
    """Two sets of weights as files in memory, as the follower leaves them, handed over in turns."""

    def __init__(self, engine: Engine, files: Sequence[Path], seen: Seen) -> None:
        self._engine = engine
        self._weights = [(file, read_keyframe(file)) for file in files]
        self._seen = seen
        self._version = 0

    async def update(self) -> None:
        """Load the other set."""
        file, weights = self._weights[self._version % len(self._weights)]
        began = time.monotonic()
        report = await self._engine.load(weights, version=self._version, file=file)
        self._version += 1
        if report.version:
            self._seen.loads_s.append(time.monotonic() - began)
            self._seen.pauses_s.append(report.pause_s)

    async def run(self, seconds: float) -> None:
        """An update every few seconds, none of them cut off at the end."""
        end = time.monotonic() + seconds
        while (began := time.monotonic()) < end:
            await self.update()
            await anyio.sleep(max(0.0, min(end, began + EVERY_S) - time.monotonic()))


async def compare(engine: Engine, files: Sequence[Path], vocabulary: int, *, rounds: int, phase_s: float) -> Seen:
    """Phases with and without updates, in the order - + + - - + + - …"""
    seen, load = Seen(), Load(engine, vocabulary)
    updates = Updates(engine, files, seen)
    await updates.update()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(load.run)
        await anyio.sleep(phase_s / 2)
        for number in range(2 * rounds):
            with_updates = number % 4 in (1, 2)
            cpu, tokens, began = _cpu_s(), load.tokens, time.monotonic()
            await (updates.run(phase_s) if with_updates else anyio.sleep(phase_s))
            seconds, tokens, cpu = time.monotonic() - began, load.tokens - tokens, _cpu_s() - cpu
            (seen.updated if with_updates else seen.calm).append(tokens / seconds)
            (seen.updated_cpu if with_updates else seen.calm_cpu).append(tokens / cpu)
        tasks.cancel_scope.cancel()
    return seen


def _cpu_s() -> float:
    """Of this process and all below it."""
    me = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (me, *me.children(recursive=True)))


def prepare(folder: Path) -> tuple[Path, list[Path], int]:
    """The quick-start model without end tokens, two sets of weights for it, and its vocabulary."""
    model = folder / "model"
    shutil.copytree(ROOT / "models" / "quickstart", model)
    (model / "generation_config.json").unlink(missing_ok=True)
    config = {**json.loads((model / "config.json").read_text()), "eos_token_id": None}
    (model / "config.json").write_text(json.dumps(config))
    weights = read_keyframe(model / "model.safetensors")
    files = [folder / "a.safetensors", folder / "b.safetensors"]
    for number, file in enumerate(files):
        write_keyframe(file, _nudged(weights, number), version=number)
    return model, files, int(config["vocab_size"])


def _nudged(weights: Weights, number: int) -> Weights:
    """As after a step: every value a little different."""
    return {name: Tensor(t.dtype, t.data * (1 + 1e-4 * number)) for name, t in _in_float32(weights).items()}


def _in_float32(weights: Weights) -> Weights:
    return {
        name: t if t.dtype == "float32" else Tensor("float32", (t.data.astype(np.uint32) << 16).view(np.float32))
        for name, t in weights.items()
    }


@asynccontextmanager
async def sglang_server(model: Path, settings: SglangSettings, folder: Path) -> AsyncIterator[str]:
    """URL of a server on this machine; whoever uses it waits until it is healthy."""
    port = free_port()
    async with launched(model, settings, None, port=port, seed=0, gpus=None, log=folder / "server.log"):
        yield f"http://127.0.0.1:{port}"


async def measure(*, sglang: bool, quick: bool, python: str) -> Mapping[str, Seen]:
    """Engine → what was seen of it."""
    found: dict[str, Seen] = {}
    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="matpo-swap-") as name:
        folder = Path(name)
        model, files, vocabulary = prepare(folder)
        embedded = EmbeddedSettings(max_batch=AT_ONCE, max_context_tokens=256)
        async with EmbeddedEngine.open(model, embedded, seed=0) as engine:
            rounds, phase_s = (2, 8.0) if quick else (8, 10.0)
            found["embedded"] = await compare(engine, files, vocabulary, rounds=rounds, phase_s=phase_s)
        if sglang:
            settings = SglangSettings(
                python=python, device="cpu", dtype="float32", max_batch=AT_ONCE, max_context_tokens=256
            )
            rounds, phase_s = (2, 10.0) if quick else (12, 10.0)
            async with sglang_server(model, settings, folder) as url:
                for swap in SWAPS:
                    there = SglangSettings(
                        urls=(url,), device="cpu", dtype="float32", max_context_tokens=256, swap=swap
                    )
                    async with SglangEngine.open(model, there, seed=0) as engine:
                        found[swap] = await compare(engine, files, vocabulary, rounds=rounds, phase_s=phase_s)
    return found


def main() -> int:
    """Measure, print the table, print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few phases; without --sglang under a minute")
    parser.add_argument("--sglang", action="store_true", help="also a real SGLang server on the CPU")
    parser.add_argument("--python", default=str(ROOT / ".venv-sglang" / "bin" / "python"), help="SGLang's interpreter")
    options = parser.parse_args()
    found = anyio.run(
        lambda: measure(sglang=options.sglang, quick=options.quick, python=options.python),
        backend_options={"use_uvloop": True},
    )
    print(f"an update every {EVERY_S} s (bars: ratio ≥ 0.97, pause ≤ 2 % of a step)")
    print("engine        ratio  per CPU s  tokens/s   pause ms: median   mean    max   of a step   load ms")
    figures: dict[str, float] = {}
    for name, seen in found.items():
        f = seen.figures(name)
        figures |= f
        print(
            f"{name:<12}{f[f'{name}_ratio']:>7.3f}{f[f'{name}_cpu_ratio']:>11.3f}{f[f'{name}_tokens_per_s']:>10.0f}"
            f"{f[f'{name}_pause_ms_median']:>19.1f}{f[f'{name}_pause_ms_mean']:>7.1f}{f[f'{name}_pause_ms_max']:>7.0f}{f[f'{name}_pause_share']:>12.2%}"
            f"{f[f'{name}_load_ms_median']:>10.0f}"
        )
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
