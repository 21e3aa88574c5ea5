"""One optimizer step on the same sequences and model: ours against TRL's GRPO loss path, both the clipped loss
per token on recorded trees in float32; CPU time, peak memory and how far the two gradients are apart.

TRL is an environment of its own: `make trl`, then `.cache/trl/bin/python -m benchmarks.trl [--quick] [--run RUN]`. Its
micro-batches hold eight sequences as they come, each padded to the longest of its eight (left for prompts, right for
completions, as TRL pads; its own data path pads to the longest of the whole batch), without gradient checkpointing.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import GRPOConfig, GRPOTrainer

from benchmarks.recorded import MODEL, recorded_run, recorded_samples
from benchmarks.runs import ROOT, print_result
from learner.trainer.memory import peak_bytes, reset_peak
from learner.trainer.model import Policy
from learner.trainer.pack import pack
from learner.trainer.plan import Sample
from learner.trainer.step import accumulate
from matpo.config import Clip, Learner
from matpo.folder import RunFolder

CPU: Final = torch.device("cpu")
ROWS: Final = 8
"""Sequences of TRL's micro-batches."""
LEARNER: Final = Learner(objective=Clip(dual_clip=1e9), lr=1e-6)
"""TRL's loss has no dual clip."""


class Side:
    """One of the two ways to take a step; the optimizer is the same."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters.values(), lr=LEARNER.lr, fused=True)

    def gradients(self) -> None:
        """Leave the step's gradient in every parameter."""
        raise NotImplementedError

    def timed_gradients(self) -> float:
        """CPU seconds."""
        started = time.process_time()
        self.gradients()
        return time.process_time() - started

    def timed_update(self) -> float:
        """Clipping and optimizer; CPU seconds."""
        started = time.process_time()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), LEARNER.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.process_time() - started


class Ours(Side):
    """Packing included."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples
        self.policy = Policy.load(MODEL, LEARNER)
        super().__init__(self.policy.parameters)

    def gradients(self) -> None:
        limit = LEARNER.micro_batch_tokens
        batches = pack(self.samples, limit_tokens=limit, device=CPU, shape=self.policy.shape)
        accumulate(self.policy, batches, LEARNER.objective)


class Theirs(Side):
    """`GRPOTrainer.compute_loss` on padded micro-batches, backward after each."""

    def __init__(self, samples: Sequence[Sample], output: Path) -> None:
        count = -(-len(samples) // ROWS)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        settings = GRPOConfig(
            output_dir=str(output),
            per_device_train_batch_size=ROWS,
            gradient_accumulation_steps=count,
            num_generations=ROWS,
            loss_type="dapo",  # the sum over all tokens divided by their number
            beta=0.0,
            temperature=samples[0].temperature,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to=[],
        )
        self.trainer = GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=settings,
            train_dataset=Dataset.from_list([{"prompt": "unused"}] * ROWS),
            processing_class=AutoTokenizer.from_pretrained(MODEL),
        )
        self.trainer.current_gradient_accumulation_steps = count
        self.model = model.train()
        total = sum(int(sample.sampled.sum()) for sample in samples)
        self.micro_batches = [padded(samples[at : at + ROWS], total) for at in range(0, len(samples), ROWS)]
        super().__init__(dict(model.named_parameters()))

    def gradients(self) -> None:
        for inputs in self.micro_batches:
            torch.autograd.backward(self.trainer.compute_loss(self.model, inputs))


def padded(samples: Sequence[Sample], total: int) -> dict[str, Tensor]:
    """TRL's inputs: the prompt ends before the first sampled token; what tools wrote after it is masked."""
    firsts = [int(np.flatnonzero(sample.sampled)[0]) for sample in samples]
    before = max(firsts)
    after = max(len(sample.tokens) - first for sample, first in zip(samples, firsts, strict=True))
    prompts, completions = (torch.zeros(len(samples), width, dtype=torch.long) for width in (before, after))
    prompt_mask, completion_mask = torch.zeros_like(prompts), torch.zeros_like(completions)
    sampled, behaviour = torch.zeros_like(completions), torch.zeros(completions.shape)
    for row, (sample, first) in enumerate(zip(samples, firsts, strict=True)):
        tokens, flags = torch.from_numpy(sample.tokens).long(), torch.from_numpy(sample.sampled)
        rest = len(tokens) - first
        prompts[row, before - first :], prompt_mask[row, before - first :] = tokens[:first], 1
        completions[row, :rest], completion_mask[row, :rest] = tokens[first:], 1
        sampled[row, :rest] = flags[first:]
        behaviour[row, :rest][flags[first:]] = torch.from_numpy(sample.behaviour)
    return {
        "prompt_ids": prompts,
        "prompt_mask": prompt_mask,
        "completion_ids": completions,
        "completion_mask": completion_mask,
        "tool_mask": sampled,
        "advantages": torch.tensor([sample.advantage for sample in samples]),
        "old_per_token_logps": behaviour,
        "num_items_in_batch": torch.tensor(total),
    }


def take(folder: RunFolder, sequences: int) -> tuple[Sample, ...]:
    """The first sequences of a run's first step, every token weighted alike."""
    _, samples = recorded_samples(folder)
    chosen = samples[:sequences]
    weight = 1 / sum(int(sample.sampled.sum()) for sample in chosen)
    return tuple(replace(sample, weight=weight) for sample in chosen)


def make(side: str, samples: Sequence[Sample], output: Path) -> Side:
    return Ours(samples) if side == "ours" else Theirs(samples, output)


def difference(ours: Side, theirs: Side) -> float:
    """Largest difference of a gradient entry, relative to the largest entry of its tensor."""
    worst = 0.0
    for name, expected in theirs.parameters.items():
        found = ours.parameters[name].grad
        if expected.grad is None or found is None:
            raise ValueError(f"{name} got no gradient")
        worst = max(worst, float((found - expected.grad).abs().max() / expected.grad.abs().max()))
    return worst


def peak_of(side: str, folder: RunFolder, sequences: int) -> int:
    """Peak memory of a step in a process of its own, beyond what it held before: gradients, optimizer, activations."""
    command = [sys.executable, "-m", "benchmarks.trl", "--run", str(folder.path), "--sequences", str(sequences)]
    done = subprocess.run([*command, "--measure", side], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def measure(side: str, samples: Sequence[Sample], output: Path) -> int:
    prepared = make(side, samples, output)
    reset_peak(CPU)
    before = peak_bytes(CPU)
    prepared.timed_gradients()
    prepared.timed_update()
    return peak_bytes(CPU) - before


def compare(folder: RunFolder, sequences: int, rounds: int, output: Path) -> None:
    samples = take(folder, sequences)
    lengths = [len(sample.inputs) for sample in samples]
    memory = {side: peak_of(side, folder, sequences) for side in ("ours", "trl")}
    ours, theirs = make("ours", samples, output), make("trl", samples, output)
    gap, seconds = 0.0, []
    for number in range(rounds):
        took = [side.timed_gradients() for side in (ours, theirs)]
        if not number:  # both still have the same weights
            gap = difference(ours, theirs)
        seconds.append((took[0] + ours.timed_update(), took[1] + theirs.timed_update()))
        print(f"ours {seconds[-1][0]:.2f} s, TRL {seconds[-1][1]:.2f} s of CPU", flush=True)
    ratio = statistics.median(them / us for us, them in seconds)
    computed = sum(batch.computed.tokens for batch in pack(samples, limit_tokens=1 << 20, device=CPU))
    print_result(
        {
            "speedup_vs_trl": round(ratio, 2),
            "memory_vs_trl": round(memory["ours"] / memory["trl"], 3),
            "max_rel_grad_diff": gap,
            "ours_cpu_s": round(min(us for us, _ in seconds), 2),
            "trl_cpu_s": round(min(them for _, them in seconds), 2),
            "ours_mb": round(memory["ours"] / 1e6),
            "trl_mb": round(memory["trl"] / 1e6),
            "sequences": len(samples),
            "tokens": sum(lengths),
            "unique_tokens": computed,
        }
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trl", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="four sequences, once")
    parser.add_argument("--run", type=Path, help="folder of a run with SmolLM2 (default: record one)")
    parser.add_argument("--sequences", type=int, help="how many (16; quick: 4)")
    parser.add_argument("--measure", choices=("ours", "trl"), help="print the peak memory of one side, in bytes")
    options = parser.parse_args(argv)
    sequences: int = options.sequences or (4 if options.quick else 16)
    torch.set_num_threads(1)
    with recorded_run(options.run) as folder, TemporaryDirectory() as output:
        if options.measure:
            print(measure(options.measure, take(folder, sequences), Path(output)))
        else:
            compare(folder, sequences, 1 if options.quick else 3, Path(output))


if __name__ == "__main__":
    main()
