"""What a weight update costs: size against the entropy bound and the dense weights, GB of dense weights encoded and
applied per CPU second beside XOR + zstd-1 on the same weights in the same run, the publisher's memory, and what
`benchmarks.broadcast` measures between publication and loaded weights.

SmolLM2-135M after real AdamW steps (float32 master weights; a policy gradient on text): one step at 1e-6, one at 1e-5.
Its weights are those of `make smollm2` where .cache/smollm2 exists, otherwise seeded ones of the same shapes.
`python -m benchmarks.weights [--quick]`; quick leaves out the broadcast, which has a quick form of its own. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
import orjson
import torch
import zstandard
from numpy.typing import NDArray
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks import broadcast
from learner.trainer.publish import Publisher, to_weights
from protocols.delta import PART_ELEMENTS, EncodedPart, Encoder, decode, patch_weights, write_delta
from protocols.messages import Publish
from protocols.parts import Part, bits, cut, identities, in_order, slices
from protocols.weights import Draft, Tensor, Weights, weights_digest

ROOT: Final = Path(__file__).resolve().parent.parent
SMOLLM2: Final = ROOT / ".cache" / "smollm2"
RATES: Final = {"lr_1e-6": 1e-6, "lr_1e-5": 1e-5}
BARS: Final = {
    "size_vs_entropy": "<= 1.1",
    "dense_ratio": ">= 100 at lr 1e-6",
    "encode_codec_gb_per_s": ">= 10 at 0.5 %, >= 5 at 1.4 %",
    "encode_vs_xor_zstd": ">= 2",
    "size_vs_xor_zstd": ">= 1.5",
}


@dataclass(frozen=True)
class Update:
    """One optimizer step in bfloat16."""

    before: Weights
    after: Weights
    published: Publish
    publish_cpu_s: float
    extra_copies: float
    """Most host memory the publisher took beyond the copy it keeps, in dense sizes."""

    @property
    def dense_bytes(self) -> int:
        return sum(tensor.data.nbytes for tensor in self.before.values())


@dataclass(frozen=True)
class Figures:
    """Of one learning rate. Rates are GB of dense bfloat16 per second of one core, the best of the rounds; ratios are
    medians over rounds of neighbouring measurements. "Codec" is memory to memory; the others do all the work:
    digests, and for encoding the durable file."""

    changed: float
    """Share of elements."""
    size_vs_entropy: float
    dense_ratio: float
    encode_gb_per_s: float
    apply_gb_per_s: float
    encode_codec_gb_per_s: float
    apply_codec_gb_per_s: float
    encode_vs_xor_zstd: float
    """Codec against codec."""
    apply_vs_xor_zstd: float
    encode_all_vs_xor_zstd: float
    """All the work of both."""
    size_vs_xor_zstd: float
    encode_two_threads: float
    """Wall-clock time on one thread against two."""
    publish_cpu_s: float
    """Of the publisher: rounding, delta, (at 1e-5) fold, digest."""
    extra_copies: float


def load_model() -> LlamaForCausalLM:
    """Float32 master weights."""
    torch.manual_seed(0)
    if not SMOLLM2.is_dir():
        config = LlamaConfig(
            vocab_size=49_152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
        return LlamaForCausalLM(config)
    model = LlamaForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
    with torch.no_grad():
        # A checkpoint is rounded; weights in training lie anywhere between two bfloat16 numbers.
        for parameter in model.parameters():
            power = (parameter.view(torch.int32) & 0x7F800000).view(torch.float32)  # of two, below the weight
            parameter.addcmul_(torch.rand_like(parameter).sub_(0.5), power, value=2**-7)
    return model


def load_tokens() -> torch.Tensor:
    """Our documentation, as the model reads it; random tokens for random weights."""
    if not SMOLLM2.is_dir():
        return torch.randint(49_152, (20_000,))
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md")))
    return torch.tensor(AutoTokenizer.from_pretrained(SMOLLM2)(text, verbose=False)["input_ids"])


def train(folder: Path, *, steps: int, rows: int, length: int) -> Iterator[Update]:
    """The last step at each learning rate: `steps` at the first, one more at the second."""
    model, tokens = load_model(), load_tokens()
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    publisher = Publisher(folder, dtype="bfloat16", keyframe_every=1000)
    small = {"": Tensor("bfloat16", np.zeros(1, np.uint16))}
    write_delta(folder / "first_use", small, small, base_version=0, version=0)  # loads or compiles the loops
    rates = [1e-6] * steps + [1e-5]
    for number, rate in enumerate(rates, start=1):
        if number == steps:
            publisher.publish(parameters, version=1)
        before = to_weights(parameters, "bfloat16") if number >= steps else {}
        optimizer.param_groups[0]["lr"] = rate
        starts = torch.randint(len(tokens) - length, (rows,))
        batch = torch.stack([tokens[start : start + length] for start in starts.tolist()])
        advantage = torch.randn(rows, 1)
        logits = model(batch).logits[:, :-1]
        logp = torch.log_softmax(logits, dim=-1).gather(-1, batch[:, 1:, None])[..., 0]
        optimizer.zero_grad()
        torch.autograd.backward((-(advantage - advantage.mean()) * logp).mean())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if number >= steps:
            tracemalloc.start()
            started = time.thread_time()
            published = publisher.publish(parameters, version=2 + number - steps)
            cpu_s, peak = time.thread_time() - started, tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            after = to_weights(parameters, "bfloat16")
            yield Update(before, after, published, cpu_s, peak / sum(t.data.nbytes for t in after.values()))


def entropy_bytes(update: Update) -> tuple[float, float]:
    """Share of elements that changed, and the bound if which do, and by how many ulps, were drawn independently."""
    steps: list[NDArray[np.int64]] = []
    elements = 0
    for name, tensor in update.before.items():
        old, new = bits(tensor), bits(update.after[name])
        at = np.flatnonzero(old != new)
        places = (np.where(b & 0x8000, 0xFFFF - b, b | 0x8000) for b in (new[at].astype(int), old[at].astype(int)))
        steps.append(np.subtract(*places))
        elements += len(old)
    moved = np.concatenate(steps)
    share = len(moved) / elements
    _, counts = np.unique(moved, return_counts=True)
    each = counts / len(moved)
    value_bits = -float((each * np.log2(each)).sum())
    place_bits = -(share * np.log2(share) + (1 - share) * np.log2(1 - share))
    return share, float(elements * (place_bits + share * value_bits) / 8)


def encode_ours(update: Update, threads: int = 1) -> list[EncodedPart]:
    """Memory to memory."""
    encoder = Encoder(update.after)

    def work(part: Part) -> EncodedPart:
        return encoder.encode(slices(update.before, part), slices(update.after, part))

    return list(in_order(work, cut(update.after, PART_ELEMENTS), threads))


def encode_xor(update: Update, room: NDArray[np.uint16]) -> list[bytes]:
    """The common alternative: what differs by exclusive or, through zstd at level 1, tensor by tensor."""
    packer = zstandard.ZstdCompressor(level=1)
    packed: list[bytes] = []
    for name, tensor in update.before.items():
        old, new = bits(tensor), bits(update.after[name])
        packed.append(packer.compress(np.bitwise_xor(old, new, out=room[: len(old)]).data))
    return packed


def apply_xor(packed: list[bytes], weights: Weights) -> None:
    """Where the weights lie."""
    unpacker = zstandard.ZstdDecompressor()
    for frame, tensor in zip(packed, weights.values(), strict=True):
        array = bits(tensor)
        np.bitwise_xor(array, np.frombuffer(unpacker.decompress(frame), np.uint16), out=array)


def copy_of(weights: Weights) -> Weights:
    return {name: Tensor(tensor.dtype, tensor.data.copy()) for name, tensor in weights.items()}


def cpu_s(work: Callable[[], object]) -> float:
    """CPU seconds of this thread."""
    started = time.thread_time()
    work()
    return time.thread_time() - started


def wall_s(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class Bench:
    """One update, and what is timed of it, ours and the XOR baseline."""

    def __init__(self, update: Update, folder: Path) -> None:
        self.path, self._file = folder / "delta", folder / "xor"
        self._update = update
        self._base_digest = weights_digest(update.before)
        self._room = np.empty(max(tensor.data.size for tensor in update.before.values()), np.uint16)
        self._ours, self.xor = encode_ours(update), encode_xor(update, self._room)
        self.held = copy_of(update.before)

    def reset(self) -> None:
        for name, tensor in self._update.before.items():
            bits(self.held[name])[:] = bits(tensor)

    def encode(self) -> None:
        encode_ours(self._update)

    def encode_on_two(self) -> None:
        encode_ours(self._update, 2)

    def xor_encode(self) -> None:
        encode_xor(self._update, self._room)

    def write(self) -> None:
        before, after = self._update.before, self._update.after
        write_delta(self.path, before, after, base_version=1, version=2, base_digest=self._base_digest)

    def xor_write(self) -> None:
        with Draft(self._file) as draft:
            for frame in encode_xor(self._update, self._room):
                draft.write(frame)
            identities(self._update.after, 1)
            draft.commit()

    def apply(self) -> None:
        for part, encoded in zip(cut(self.held, PART_ELEMENTS), self._ours, strict=True):
            decode(encoded, slices(self.held, part))

    def xor_apply(self) -> None:
        apply_xor(self.xor, self.held)

    def patch(self) -> None:
        patch_weights(self.path, self.held, base_version=1, base_digest=self._base_digest)


def time_rounds(bench: Bench, rounds: int) -> dict[str, list[float]]:
    """Seconds of every piece of work in each round: interleaved, without the first, which warms up."""
    work: dict[str, Callable[[], object]] = {
        "encode": bench.encode,
        "xor_encode": bench.xor_encode,
        "write": bench.write,
        "xor_write": bench.xor_write,
        "apply": bench.apply,
        "xor_apply": bench.xor_apply,
        "patch": bench.patch,
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*work, "one", "two")}
    for _ in range(rounds + 1):
        for name, task in work.items():
            if name in ("apply", "xor_apply", "patch"):
                bench.reset()
            seconds[name].append(cpu_s(task))
        seconds["one"].append(wall_s(bench.encode))
        seconds["two"].append(wall_s(bench.encode_on_two))
    return {name: taken[1:] for name, taken in seconds.items()}


def measure(update: Update, folder: Path, rounds: int) -> Figures:
    """Time both ways, and check that ours arrived."""
    bench = Bench(update, folder)
    seconds = time_rounds(bench, rounds)
    assert weights_digest(bench.held) == weights_digest(update.after)
    dense_gb = update.dense_bytes / 1e9
    size = bench.path.stat().st_size
    share, bound = entropy_bytes(update)

    def rate(name: str) -> float:
        return dense_gb / min(seconds[name])

    def ratio(slow: str, fast: str) -> float:
        return statistics.median(s / f for s, f in zip(seconds[slow], seconds[fast], strict=True))

    return Figures(
        changed=share,
        size_vs_entropy=size / bound,
        dense_ratio=update.dense_bytes / size,
        encode_gb_per_s=rate("write"),
        apply_gb_per_s=rate("patch"),
        encode_codec_gb_per_s=rate("encode"),
        apply_codec_gb_per_s=rate("apply"),
        encode_vs_xor_zstd=ratio("xor_encode", "encode"),
        apply_vs_xor_zstd=ratio("xor_apply", "apply"),
        encode_all_vs_xor_zstd=ratio("xor_write", "write"),
        size_vs_xor_zstd=sum(map(len, bench.xor)) / size,
        encode_two_threads=ratio("one", "two"),
        publish_cpu_s=update.publish_cpu_s,
        extra_copies=update.extra_copies,
    )


def main() -> int:
    """Measure, print the table, print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter steps, no broadcast; under 60 s")
    quick = parser.parse_args().quick
    rounds, steps, rows, length = (3, 3, 2, 32) if quick else (15, 16, 4, 128)
    found: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as name:
        for label, update in zip(RATES, train(Path(name), steps=steps, rows=rows, length=length), strict=True):
            found[label] = measure(update, Path(name), rounds)
    print(f"SmolLM2-135M {'weights' if SMOLLM2.is_dir() else 'shapes'}, {steps} steps of {rows} x {length} tokens")
    print(f"{'figure':<26}" + "".join(f"{label:>12}" for label in found) + "  bar")
    tables = {label: asdict(figures) for label, figures in found.items()}
    for figure in tables["lr_1e-6"]:
        values = "".join(f"{table[figure]:>12.4g}" for table in tables.values())
        print(f"{figure:<26}{values}  {BARS.get(figure, '')}")
    figures: dict[str, object] = {
        label: {key: round(value, 4) for key, value in table.items()} for label, table in tables.items()
    }
    if not quick:
        spread = broadcast.measure(quick=False)
        figures |= {
            "slow_actor_cost": spread.slow_actor_cost,
            "publish_to_loaded_s": {"keyframe": spread.keyframe_s, "delta": spread.delta_s},
            "cpu_per_gb_vs_tcp": spread.cpu_per_gb_vs_tcp,
        }
    print(orjson.dumps(figures, option=orjson.OPT_NON_STR_KEYS).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
