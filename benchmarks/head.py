"""The chunked head against whole logits: peak memory, CPU time and gradients of the paper's clipped loss on the same
tokens of a 49k vocabulary. `python -m benchmarks.head [--quick]`; the last line is one JSON object.

Memory is what a process of its own takes on top of hidden states and weights (both ways end with the same gradients in
it); time is interleaved in one process.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.runs import ROOT, print_result
from learner.trainer.head import Head, chunk_rows, score_and_backward
from learner.trainer.memory import peak_bytes, reset_peak
from learner.trainer.pack import MicroBatch, micro_batch
from learner.trainer.plan import Sample
from matpo.config import Clip
from matpo.objective.chosen import token_loss
from matpo.objective.tokens import Tokens

CPU = torch.device("cpu")
BARS = {"memory_vs_full": 0.2, "time_vs_full": 1.0}


@dataclass(frozen=True, eq=False)
class Case:
    """Hidden states of some tokens, each of which predicts the next, and the projection to the vocabulary."""

    hidden_NE: Tensor
    weight_VE: torch.nn.Parameter
    batch: MicroBatch

    @classmethod
    def make(cls, tokens: int, *, hidden: int = 576, vocabulary: int = 49_152) -> Case:
        torch.manual_seed(0)
        rng = np.random.default_rng(0)
        sample = Sample(
            role="planner",
            tokens=rng.integers(0, vocabulary, tokens + 1, dtype=np.int32),
            sampled=np.arange(tokens + 1) > 0,
            behaviour=rng.uniform(-11.5, -10, tokens).astype(np.float32),
            advantage=1.0,
            weight=1 / tokens,
            temperature=1.0,
        )
        weight = torch.nn.Parameter(torch.randn(vocabulary, hidden) * 0.02)
        return cls(torch.randn(tokens, hidden), weight, micro_batch([sample], CPU))

    def loss(self, logp_T: Tensor, at: slice) -> Tensor:
        batch = self.batch
        terms = token_loss(Clip(), Tokens(logp_T, behaviour_T=batch.behaviour_T[at], advantage_T=batch.advantage_T[at]))
        return (batch.weight_T[at] * terms.loss_T).sum()


def whole(case: Case) -> Tensor:
    """Logits of all tokens at once, log-softmax, autograd."""
    hidden_NE = case.hidden_NE.detach().requires_grad_()
    logp_KV = (hidden_NE[case.batch.predictor_K] @ case.weight_VE.T).log_softmax(-1)
    logp_T = logp_KV.gather(1, case.batch.target_K[:, None]).squeeze(1)[case.batch.scored_T]
    torch.autograd.backward(case.loss(logp_T, slice(None)))
    assert hidden_NE.grad is not None
    return hidden_NE.grad


def chunked(case: Case) -> Tensor:
    """The trainer's head; it computes every token's entropy too."""
    head = Head(case.weight_VE, None, torch.float32)
    _, grad_NE = score_and_backward(head, case.hidden_NE, case.batch, lambda logp_T, _, at: case.loss(logp_T, at))
    return grad_NE


WAYS: dict[str, Callable[[Case], Tensor]] = {"whole": whole, "chunked": chunked}


def extra_bytes(way: str, tokens: int) -> int:
    """Peak memory of one way in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.head", "--measure", way, "--tokens", str(tokens)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=True)
    return int(done.stdout)


def measure(way: str, tokens: int) -> int:
    case = Case.make(tokens)
    WAYS[way](Case.make(8))  # whatever libraries set up on first use
    reset_peak(CPU)
    before = peak_bytes(CPU)
    WAYS[way](case)
    return peak_bytes(CPU) - before


def timed(way: str, case: Case) -> tuple[float, Tensor]:
    case.weight_VE.grad = None
    started = time.process_time()
    grad_NE = WAYS[way](case)
    assert case.weight_VE.grad is not None
    return time.process_time() - started, torch.cat([grad_NE, case.weight_VE.grad[:1000]])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="time each way once")
    parser.add_argument("--measure", choices=WAYS, help="print the peak memory of one way, in bytes")
    parser.add_argument("--tokens", type=int, default=3072, help="scored tokens (%(default)s)")
    options = parser.parse_args(argv)
    tokens: int = options.tokens
    torch.set_num_threads(1)
    if options.measure:
        print(measure(options.measure, tokens))
        return
    memory = {way: extra_bytes(way, tokens) for way in WAYS}
    case = Case.make(tokens)
    ratios, seconds, difference = [], [], 0.0
    for _ in range(1 if options.quick else 5):
        (whole_s, expected), (chunked_s, found) = (timed(way, case) for way in ("whole", "chunked"))
        ratios.append(chunked_s / whole_s)
        seconds.append((whole_s, chunked_s))
        difference = max(difference, float((found - expected).abs().max() / expected.abs().max()))
        print(f"whole {whole_s:.2f} s, chunked {chunked_s:.2f} s of CPU")
    print_result(
        {
            "memory_vs_full": round(memory["chunked"] / memory["whole"], 3),
            "time_vs_full": round(statistics.median(ratios), 3),
            "max_rel_grad_diff": difference,
            "whole_mb": round(memory["whole"] / 1e6),
            "chunked_mb": round(memory["chunked"] / 1e6),
            "whole_cpu_s": round(min(pair[0] for pair in seconds), 2),
            "chunked_cpu_s": round(min(pair[1] for pair in seconds), 2),
            "tokens": tokens,
            "chunk_rows": chunk_rows(len(case.weight_VE), CPU),
            "bars": dict(BARS),
        }
    )


if __name__ == "__main__":
    main()
