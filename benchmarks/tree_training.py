"""Training on shared prefixes against packing and padding: the same sequences, model, kernels and loss, interleaved in
one process after a pass that warms up, CPU time of one thread. `python -m benchmarks.tree_training [--quick]`; the last
line is one JSON object.

Padded: eight sequences as they come, padded to the longest, with PyTorch's own attention. Packed: first-fit decreasing
into bins of 4096 tokens, every sequence attending to itself alone, with the kernel the tree uses. Only loss and
gradients are timed, which is all that differs. Padding, the slowest, is timed once."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.runs import print_result
from benchmarks.tree_shapes import Episodes
from learner.trainer.attention.interface import implementation
from learner.trainer.attention.packed import PaddedPaths, PathBlock
from learner.trainer.attention.plan import AttentionPlan
from learner.trainer.costs import PADDED_ROWS, padded_work
from learner.trainer.model import Policy
from learner.trainer.pack import MicroBatch, micro_batch, pack
from learner.trainer.plan import Sample
from learner.trainer.step import accumulate
from learner.trainer.trie import Trie
from matpo.config import Dppo, Learner

CPU = torch.device("cpu")
BIN_TOKENS = 4096
VOCABULARY = 2048
SHAPES = {
    "append_only": Episodes("append_only", trees=3, workers=(1, 1), turns=(3, 5), system=400),
    "context_edited": Episodes("context_edited", trees=3, workers=(1, 1), turns=(3, 5), system=300),
    "per_turn": Episodes("per_turn", trees=3, workers=(1, 1), turns=(3, 5), system=200),
}
"""Three trees of one task, a planner and a worker each."""
QUICK = {name: replace(shape, trees=2, system=150, turns=(2, 4)) for name, shape in SHAPES.items()}


class PaddedPlan(AttentionPlan):
    """Sequences padded eight at a time, in the order they come."""

    def __init__(self, trie: Trie) -> None:
        super().__init__(trie, CPU)
        blocks = []
        for start in range(0, len(trie.paths), PADDED_ROWS):
            rows = trie.paths[start : start + PADDED_ROWS]
            longest = max(map(len, rows))
            tokens = np.stack([np.pad(row, (0, longest - len(row)), mode="edge") for row in rows])
            kept = np.arange(longest) < np.array([len(row) for row in rows])[:, None]
            blocks.append(PathBlock(torch.from_numpy(tokens), torch.from_numpy(np.flatnonzero(kept))))
        work = padded_work(np.array([len(row) for row in trie.paths]), scored=0)
        self.padded = PaddedPaths(tuple(blocks), torch.arange(len(trie.tokens)), work.tokens, work.pairs)

    @property
    def paths(self) -> PaddedPaths:
        return self.padded


def side_by_side(samples: Sequence[Sample], plan: Callable[[Trie], AttentionPlan]) -> MicroBatch:
    """A micro-batch that shares nothing: each sequence is a tree of its own."""
    alone = [micro_batch([sample], CPU) for sample in samples]
    lengths = [len(one.tokens_N) for one in alone]
    token_at, scored_at = np.cumsum([0, *lengths]), np.cumsum([0, *(len(one.target_K) for one in alone)])
    paths = tuple(np.arange(start, end) for start, end in pairwise(token_at))

    def joined(part: Callable[[MicroBatch], Tensor]) -> Tensor:
        return torch.cat([part(one) for one in alone])

    tokens, positions = joined(lambda one: one.tokens_N), joined(lambda one: one.positions_N)
    trie = Trie(tokens.numpy(), positions.numpy(), np.repeat(token_at[1:], lengths), paths, tuple(range(len(paths))))
    return replace(
        alone[0],
        tokens_N=tokens,
        positions_N=positions,
        plan=plan(trie),
        predictor_K=torch.cat([one.predictor_K + int(at) for one, at in zip(alone, token_at, strict=False)]),
        target_K=joined(lambda one: one.target_K),
        temperature_K=joined(lambda one: one.temperature_K),
        scored_T=torch.cat([one.scored_T + int(at) for one, at in zip(alone, scored_at, strict=False)]),
        behaviour_T=joined(lambda one: one.behaviour_T),
        advantage_T=joined(lambda one: one.advantage_T),
        weight_T=joined(lambda one: one.weight_T),
        role_T=joined(lambda one: one.role_T),
        trajectory_T=torch.cat([torch.full_like(one.role_T, number) for number, one in enumerate(alone)]),
    )


def first_fit_decreasing(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Bins of at most `BIN_TOKENS` tokens."""
    bins: list[list[Sample]] = []
    room: list[int] = []
    for sample in sorted(samples, key=lambda sample: -len(sample.inputs)):
        length = len(sample.inputs)
        fits = next((number for number, free in enumerate(room) if free >= length), None)
        if fits is None:
            bins.append([])
            room.append(BIN_TOKENS)
            fits = len(bins) - 1
        bins[fits].append(sample)
        room[fits] -= length
    return bins


@dataclass(frozen=True)
class Way:
    """One way of computing the same gradient."""

    policy: Policy
    attention: str
    batches: tuple[MicroBatch, ...]

    def seconds(self) -> float:
        """CPU time of loss and gradients."""
        self.policy.model.set_attn_implementation(self.attention)
        started = time.process_time()
        accumulate(self.policy, self.batches, Dppo())
        return time.process_time() - started

    def gradients(self) -> dict[str, Tensor]:
        """Left by the last `seconds`."""
        return {name: p.grad.clone() for name, p in self.policy.parameters.items() if p.grad is not None}


def gemm_seconds(policy: Policy, tokens: int) -> tuple[float, int]:
    """CPU time and operations of the model's own matrix products, forward and backward, on `tokens` rows."""
    seconds, operations = 0.0, 0
    for weight in [p.detach() for p in policy.parameters.values() if p.ndim == 2]:
        rows, grads = torch.randn(tokens, weight.shape[1]), torch.randn(tokens, weight.shape[0])
        results = torch.empty(tokens, weight.shape[0]), torch.empty_like(rows), torch.empty_like(weight)
        started = time.process_time()
        torch.mm(rows, weight.T, out=results[0])
        torch.mm(grads, weight, out=results[1])
        torch.mm(grads.T, rows, out=results[2])
        seconds += time.process_time() - started
        operations += 6 * tokens * weight.numel()
    return seconds, operations


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of any gradient entry, relative to the largest entry of its tensor."""
    return max(float((found[name] - grad).abs().max() / grad.abs().max()) for name, grad in expected.items())


def measure(policy: Policy, shape: Episodes, *, repeats: int) -> dict[str, JsonValue]:
    """Figures of one shape, medians over interleaved repetitions."""
    samples = shape.samples(VOCABULARY, seed=0)
    tree = pack(samples, limit_tokens=16_384, device=CPU, shape=policy.shape)
    rectangle = implementation("rectangle")
    ways = {
        "padded": Way(replace(policy, attention="packed"), "sdpa", (side_by_side(samples, PaddedPlan),)),
        "packed": Way(
            policy,
            rectangle,
            tuple(side_by_side(each, lambda trie: AttentionPlan(trie, CPU)) for each in first_fit_decreasing(samples)),
        ),
        "tree": Way(policy, rectangle, tree),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    gradients: dict[str, dict[str, Tensor]] = {}
    rates = []
    unique = sum(len(batch.tokens_N) for batch in tree)
    for name in ("packed", "tree"):
        ways[name].seconds()  # pages, plans and whatever libraries set up on first use
    for number in range(repeats):
        for name, way in ways.items():
            if name == "padded" and number:
                continue
            seconds[name].append(way.seconds())
            gradients[name] = way.gradients()
        spent, operations = gemm_seconds(policy, min(unique, BIN_TOKENS))
        rates.append(operations / spent)
    cost = sum(policy.shape.flops(batch.computed) for batch in tree)
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    ratio = sum(policy.shape.flops(batch.packed) for batch in tree) / cost
    speedup = middle["packed"] / middle["tree"]
    result: dict[str, JsonValue] = {
        "sequences": len(samples),
        "tokens": sum(len(sample.inputs) for sample in samples),
        "unique_tokens": unique,
        "flop_ratio": round(ratio, 3),
        "speedup_vs_packed": round(speedup, 3),
        "achieved_of_flop_ratio": round(speedup / ratio, 3),
        "speedup_vs_padded": round(middle["padded"] / middle["tree"], 3),
        "gemm_fraction": round(cost / middle["tree"] / statistics.median(rates), 3),
        "gemm_gflops": round(statistics.median(rates) / 1e9, 1),
        "max_rel_grad_diff": float(f"{largest_difference(gradients['tree'], gradients['packed']):.2g}"),
        "padded_rel_grad_diff": float(f"{largest_difference(gradients['padded'], gradients['packed']):.2g}"),
    }
    print(f"{shape.form:15} CPU s: { ({name: [round(s, 2) for s in times] for name, times in seconds.items()}) }")
    print(f"{'':15} {result}", flush=True)
    return result


def make_policy(*, layers: int) -> Policy:
    """A Qwen3-class model of 384 hidden units with grouped key heads; 14 million parameters with six layers."""
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=384, num_hidden_layers=layers, num_attention_heads=6, num_key_value_heads=2, head_dim=64,
        intermediate_size=1536, vocab_size=VOCABULARY, max_position_embeddings=32_768, tie_word_embeddings=True,
    )  # fmt: skip
    return Policy.of(Qwen3ForCausalLM(config), Learner())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tree_training", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two small trees, two layers, one repetition")
    parser.add_argument("--shape", choices=tuple(SHAPES), action="append", help="only this one (may be repeated)")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    policy = make_policy(layers=2 if arguments.quick else 6)
    shapes = QUICK if arguments.quick else SHAPES
    result: dict[str, JsonValue] = {"parameters": sum(p.numel() for p in policy.parameters.values())}
    for name in arguments.shape or shapes:
        result[name] = measure(policy, shapes[name], repeats=1 if arguments.quick else arguments.repeats)
    print_result(result)


if __name__ == "__main__":
    main()
