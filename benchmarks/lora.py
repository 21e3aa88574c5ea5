"""What an adapter saves: bytes of gradients and optimizer state, CPU time of a step and bytes published per version,
against training all weights of the same model on the same trees in the same run.

SmolLM2-135M in float32 (its weights are those of `make smollm2` where .cache/smollm2 exists, otherwise seeded ones of
the same shapes), rank 16 on all seven projections, real AdamW steps on groups of sequences that share a prefix.
`python -m benchmarks.lora [--quick]`. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import orjson
import torch

from benchmarks.weights import SMOLLM2, load_model
from learner.trainer.model import Policy
from learner.trainer.pack import MicroBatch, pack
from learner.trainer.plan import Sample
from learner.trainer.publish import Publisher
from learner.trainer.setup import make_deterministic
from learner.trainer.step import accumulate, make_optimizer, train_step
from matpo.config import Dppo, Learner, Lora

SETTINGS: Final = {"full": None, "adapter": Lora(), "merged": Lora(publish="merged")}
"""Rank 16, alpha 32 and all projections are the defaults."""
RATES: Final = {"full": 1e-5, "adapter": 1e-4, "merged": 1e-4}


@dataclass(slots=True)
class Trained:
    """One way of training, and what it took."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    learner: Learner
    publisher: Publisher
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    published_bytes: int = 0

    @property
    def trained_parameters(self) -> int:
        return sum(p.numel() for p in self.policy.parameters.values())

    def step(self, batches: tuple[MicroBatch, ...], number: int) -> float:
        """Take and publish a step; returns the CPU seconds of the step alone."""
        started = time.process_time()
        train_step(self.policy, self.optimizer, batches, self.learner, step=number, steps=1_000)
        seconds = time.process_time() - started
        published = self.publisher.publish(self.policy.published, version=number)
        self.published_bytes = min(item.size_bytes for item in published.objects)
        return seconds

    def weigh(self, batches: tuple[MicroBatch, ...]) -> None:
        """Count what a step leaves in memory."""
        accumulate(self.policy, batches, Dppo())
        parameters = self.policy.parameters.values()
        self.gradient_bytes = sum(p.grad.nbytes for p in self.policy.model.parameters() if p.grad is not None)
        self.optimizer_bytes = sum(v.nbytes for p in parameters for v in self.optimizer.state[p].values())


def begin(label: str, folder: Path) -> Trained:
    learner = Learner(lr=RATES[label])
    policy = Policy.of(load_model(), learner, SETTINGS[label])
    publisher = Publisher(folder / label, dtype="bfloat16", keyframe_every=1_000)
    publisher.publish(policy.published, version=0)
    return Trained(policy, make_optimizer(policy, learner), learner, publisher)


def make_rows(groups: int, members: int, prefix: int, length: int) -> list[Sample]:
    """Groups of sequences that share a prefix; the rest of each is sampled."""
    draw = np.random.default_rng(0)
    rows = []
    for _ in range(groups):
        shared = draw.integers(0, 49_000, prefix)
        for member in range(members):
            tokens = np.concatenate([shared, draw.integers(0, 49_000, length - prefix)]).astype(np.int32)
            sampled = np.arange(length) >= prefix
            behaviour = np.full(length - prefix, -10.8, np.float32)  # about log(1 / vocabulary)
            advantage = 1.0 if member % 2 else -1.0
            weight = 1 / (groups * members * (length - prefix))
            rows.append(Sample("planner", tokens, sampled, behaviour, advantage, weight, 1.0))
    return rows


def main() -> int:
    """Measure, print the table, print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round on short sequences; under 60 s")
    quick = parser.parse_args().quick
    make_deterministic(threads=1, seed=0)
    rounds, length = (1, 48) if quick else (3, 160)
    batches = pack(make_rows(2, 4, length // 2, length), limit_tokens=4096, device=torch.device("cpu"))
    with tempfile.TemporaryDirectory() as name:
        ways = {label: begin(label, Path(name)) for label in SETTINGS}
        seconds: dict[str, list[float]] = {label: [] for label in ways}
        for number in range(1, rounds + 2):
            for label, way in ways.items():
                seconds[label].append(way.step(batches, number))
        for way in ways.values():
            way.weigh(batches)
    full, adapter = ways["full"], ways["adapter"]
    # The first step allocates.
    ratios = [b / a for a, b in zip(seconds["full"][1:], seconds["adapter"][1:], strict=True)]
    both = {label: way.gradient_bytes + way.optimizer_bytes for label, way in ways.items()}
    figures = {
        "trained_parameters": {label: way.trained_parameters for label, way in ways.items()},
        "gradient_bytes": {label: way.gradient_bytes for label, way in ways.items()},
        "optimizer_bytes": {label: way.optimizer_bytes for label, way in ways.items()},
        "state_vs_full": round(both["adapter"] / both["full"], 4),
        "published_bytes": {label: way.published_bytes for label, way in ways.items()},
        "published_vs_full": round(adapter.published_bytes / full.published_bytes, 4),
        "step_cpu_s": {label: round(statistics.median(times[1:]), 3) for label, times in seconds.items()},
        "step_time_vs_full": round(statistics.median(ratios), 3),
    }
    print(f"SmolLM2-135M {'weights' if SMOLLM2.is_dir() else 'shapes'}, float32, {len(ratios)} steps")
    for figure, value in figures.items():
        print(f"{figure:<20} {value}")
    print(orjson.dumps(figures).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
