"""Training steps of a real model on recorded trees: tokens per second, peak memory and share of the machine's
arithmetic, computing distinct tokens once and packed; how far bfloat16 gradients are from float32 ones.

`python -m benchmarks.real_model [--run RUN] [--device cuda] [--quick]`; SmolLM2-135M of `make smollm2`, on the trees of
a run of configs/smollm2.toml (recorded if none is given; a run's folder may be carried to a machine with a GPU). The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch
from pydantic import JsonValue

from benchmarks.recorded import recorded_run, recorded_samples
from benchmarks.runs import print_result
from learner.trainer.model import Policy
from learner.trainer.pack import MicroBatch, pack
from learner.trainer.plan import Sample
from learner.trainer.report import StepReport
from learner.trainer.setup import make_deterministic
from learner.trainer.step import accumulate, make_optimizer, train_step
from matpo.config import Config, Learner
from matpo.model_files import model_folder

Dtype = Literal["float32", "bfloat16"]
WAYS: Final = {"tree": "auto", "packed": "packed"}
"""Values of learner.attention."""
GEMM: Final = 2048
"""Side of the matrices whose product tells what a CPU can do."""
PEAK_TFLOPS: Final = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "RTX 4090": 165.0}
"""Dense bfloat16 with float32 sums, as their makers state it; by what the device's name contains."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one way in one type; seconds of whole steps, medians."""

    step_s: float
    peak_gb: float
    achieved_tflops: float
    """Of the arithmetic this way needs."""
    peak_share: float
    """Of the machine's: MFU."""
    report: StepReport

    def as_json(self) -> dict[str, JsonValue]:
        return {
            "step_s": round(self.step_s, 3),
            "tokens_per_s": round(self.report.tokens / self.step_s, 1),
            "peak_gb": round(self.peak_gb, 2),
            "tflops": round(self.achieved_tflops, 3),
            "mfu": round(self.peak_share, 3),
        }


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_tflops(device: torch.device, dtype: Dtype, given: float | None) -> float:
    """What the machine can do: as given, from the table for a GPU's bfloat16, otherwise the best of some products."""
    if given is not None:
        return given
    if device.type == "cuda" and dtype == "bfloat16":
        name = torch.cuda.get_device_name(device)
        known = [peak for part, peak in PEAK_TFLOPS.items() if part in name]
        if known:
            return known[0]
    side = torch.ones(GEMM, GEMM, device=device, dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    best = 0.0
    for _ in range(4):
        wait(device)
        started = time.perf_counter()
        side @ side
        wait(device)
        best = max(best, 2 * GEMM**3 / (time.perf_counter() - started) / 1e12)
    return best


def prepare(config: Config, learner: Learner, samples: Sequence[Sample]) -> tuple[Policy, tuple[MicroBatch, ...]]:
    policy = Policy.load(model_folder(config.model), learner)
    limit = learner.micro_batch_tokens
    return policy, pack(samples, limit_tokens=limit, device=policy.device, shape=policy.shape)


def timed(config: Config, learner: Learner, samples: Sequence[Sample], *, steps: int, peak: float | None) -> Figures:
    """Whole steps after one that warms up."""
    policy, batches = prepare(config, learner, samples)
    optimizer = make_optimizer(policy, learner)
    seconds, reports = [], []
    for number in range(steps + 1):
        wait(policy.device)
        started = time.perf_counter()
        reports.append(train_step(policy, optimizer, batches, learner, step=number + 1, steps=1000))
        wait(policy.device)
        seconds.append(time.perf_counter() - started)
    step_s = statistics.median(seconds[1:])
    achieved = reports[-1].flops / step_s / 1e12
    return Figures(
        step_s=step_s,
        peak_gb=max(report.peak_bytes for report in reports) / 1e9,
        achieved_tflops=achieved,
        peak_share=achieved / peak_tflops(policy.device, learner.dtype, peak),
        report=reports[-1],
    )


def gradient(config: Config, learner: Learner, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """On the CPU, of every parameter."""
    policy, batches = prepare(config, learner, samples)
    accumulate(policy, batches, learner.objective)
    return {name: p.grad.cpu() for name, p in policy.parameters.items() if p.grad is not None}


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """‖found − expected‖ / ‖expected‖ over all parameters."""
    gap = sum(float((found[name] - grad).double().square().sum()) for name, grad in expected.items())
    return float((gap / sum(float(grad.double().square().sum()) for grad in expected.values())) ** 0.5)


def exactness(config: Config, learners: dict[str, Learner], samples: Sequence[Sample]) -> dict[str, JsonValue]:
    """How far apart gradients are: tree from packed, and bfloat16 from float32."""
    expected = gradient(config, learners["tree_float32"], samples)
    return {
        name: distance(gradient(config, learner, samples), expected)
        for name, learner in learners.items()
        if name != "tree_float32"
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_model", description=__doc__)
    parser.add_argument("--run", type=Path, help="folder of a run (default: record one)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak-tflops", type=float, help="of the machine (default: table, or measured)")
    parser.add_argument("--steps", type=int, default=3, help="steps measured of each way, after one (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="four sequences, one step, float32 alone")
    options = parser.parse_args(argv)
    dtypes: tuple[Dtype, ...] = ("float32",) if options.quick else ("float32", "bfloat16")
    make_deterministic(threads=1, seed=0)
    with recorded_run(options.run) as folder:
        config, samples = recorded_samples(folder)
    samples = samples[:4] if options.quick else samples
    learners = {
        f"{way}_{dtype}": Learner.model_validate(
            {"attention": attention, "dtype": dtype, "device": options.device, "lr": 1e-6}
        )
        for way, attention in WAYS.items()
        for dtype in dtypes
    }
    result: dict[str, JsonValue] = {}
    for name, learner in learners.items():
        steps = 1 if options.quick else options.steps
        figures = timed(config, learner, samples, steps=steps, peak=options.peak_tflops)
        result[name] = figures.as_json()
        print(f"{name}: {figures.as_json()}", flush=True)
    report = figures.report
    print_result(
        {
            "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device,
            "sequences": len(samples),
            "tokens": report.tokens,
            "unique_tokens": report.unique_tokens,
            **result,
            "gradient_distance": exactness(config, learners, samples),
        }
    )


if __name__ == "__main__":
    main()
