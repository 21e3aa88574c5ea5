"""What trees and chunks of weights cost on the wire: bytes per token, codec rates per core, acknowledged gigabytes per
second between two processes. `python -m benchmarks.wire [--quick]`; the last line is one JSON object."""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import numpy as np
import orjson

from protocols.channel import HubClient, HubSocket
from protocols.codec import decode_header, decode_tree, encode_tree
from protocols.messages import Ack, ActorMessage, Chunk, ChunkRequest, Goodbye, TreeUpload
from protocols.records import EpisodeTree, Task, ToolSpan, Trajectory, Turn, WeightStamp

ROOT = Path(__file__).resolve().parent.parent
TRAJECTORIES, TOKENS_EACH, PROMPT, EXCHANGES = 40, 7_500, 1_500, 8
"""A planner and 39 workers, 300k tokens in all, of which a fifth is sampled."""
CHUNK_BYTES, WINDOW = 4 * 2**20, 8


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    value: float
    unit: str
    bar: str = ""


def make_tree(vocabulary: int) -> EpisodeTree:
    """300k tokens of random ids: 40 trajectories of a shared prompt and 8 exchanges with a tool."""
    random = np.random.default_rng(0)
    prompts = {role: random.integers(0, vocabulary, PROMPT) for role in ("planner", "worker")}
    members: list[Trajectory] = []
    spans: list[ToolSpan] = []
    exchange = (TOKENS_EACH - PROMPT) // EXCHANGES
    own = exchange // 4
    for index in range(TRAJECTORIES):
        role = "worker" if index else "planner"
        turns = [Turn(kind="prompt", start=0, stop=PROMPT)]
        sampled = np.zeros(TOKENS_EACH, dtype=np.bool_)
        for start in range(PROMPT, TOKENS_EACH, exchange):
            call = f"call_{index}_{len(turns)}"
            spans.append(
                ToolSpan(
                    trajectory=index,
                    turn=len(turns),
                    call_id=call,
                    server="search",
                    tool="search",
                    outcome="ok",
                    started_s=1.25 * len(turns),
                    seconds=0.3173,
                    result_bytes=2_048,
                )
            )
            turns.append(Turn(kind="sampled", start=start, stop=start + own, stop_reason="stop"))
            turns.append(Turn(kind="tool_result", start=start + own, stop=start + exchange, call_id=call))
            sampled[start : start + own] = True
        chosen = int(sampled.sum())
        ids = np.concatenate([prompts[role], random.integers(0, vocabulary, TOKENS_EACH - PROMPT)])
        members.append(
            Trajectory(
                role=role,
                parent=(0, 1) if index else None,
                tokens=ids.astype(np.int32),
                sampled=sampled,
                logprobs=-random.exponential(1.0, chosen).astype(np.float32),
                versions=np.sort(random.integers(40, 43, chosen)).astype(np.int32),
                turns=tuple(turns),
                status="done",
            )
        )
    return EpisodeTree(
        tree_id="tree-0123456789abcdef",
        group_id="group-17",
        lease_id="lease-17",
        episode=3,
        actor_id="actor-0",
        task=Task.make("In which city was the founder of the employer born?", ("Paris",), {"hops": 3}),
        trajectories=tuple(members),
        rewards={"total": 0.9, "answer": 1.0, "format": 1.0},
        weights=tuple(WeightStamp(version=version, digest="0" * 32) for version in (40, 41, 42)),
        tool_spans=tuple(spans),
        started_at=1_700_000_000.0,
        seconds=93.5,
    )


def best_cpu_s(work: Callable[[], object], *, rounds: int, repeats: int) -> float:
    """CPU seconds of one call: the best of the rounds, because other processes disturb caches and clocks."""
    best = math.inf
    for _ in range(rounds):
        started = time.process_time()
        for _ in range(repeats):
            work()
        best = min(best, (time.process_time() - started) / repeats)
    return best


def measure_codec(rounds: int) -> list[Row]:
    """Size and rates of the reference tree (ids below 151,936, so three bytes each)."""
    tree = make_tree(151_936)
    frames = encode_tree(tree)
    encode_s = best_cpu_s(lambda: encode_tree(tree), rounds=rounds, repeats=20)
    decode_s = best_cpu_s(lambda: decode_tree(frames), rounds=rounds, repeats=20)
    header_s = best_cpu_s(lambda: decode_header(frames[0]), rounds=rounds, repeats=500)
    small = encode_tree(make_tree(49_152))
    return [
        Row("bytes_per_token", sum(map(len, frames)) / tree.token_count, "B", "<= 4.5"),
        Row("bytes_per_token_small_vocabulary", sum(map(len, small)) / tree.token_count, "B (ids below 65,536)"),
        Row("encode_trees_per_s", 1 / encode_s, "trees of 300k tokens per CPU second", ">= 400"),
        Row("decode_trees_per_s", 1 / decode_s, "the same, everything checked"),
        Row("header_us", 1e6 * header_s, "µs to validate a header", "<= 50"),
    ]


async def serve() -> None:
    """The hub's process: acknowledge every tree, answer every chunk request."""
    chunk = bytes(CHUNK_BYTES)
    async with HubSocket.bind("tcp://127.0.0.1:0") as hub:
        print(hub.endpoint, flush=True)
        while True:
            received = await hub.receive()
            match received.message:
                case TreeUpload(tree_id=tree_id):
                    await hub.send(received.peer, Ack(tree_id=tree_id))
                case ChunkRequest(name=name, offset=offset):
                    await hub.send(received.peer, Chunk(name=name, offset=offset), [chunk])
                case _:
                    return


def request_chunk(number: int) -> ChunkRequest:
    """The chunk with this number of some object."""
    return ChunkRequest(name="keyframe", offset=number * CHUNK_BYTES, size_bytes=CHUNK_BYTES)


@contextmanager
def hub_process() -> Iterator[str]:
    """The endpoint of a hub in another process, ended by a Goodbye."""
    command = [sys.executable, "-m", "benchmarks.wire", "--serve"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
            process.wait(timeout=10)
        finally:
            process.kill()


async def keep_window(client: HubClient, ask: Callable[[int], ActorMessage], frames: list[bytes], count: int) -> float:
    """Seconds per message when at most `WINDOW` are unanswered."""
    started = time.perf_counter()
    for number in range(count + WINDOW):
        if number >= WINDOW:
            await client.receive()
        if number < count:
            assert await client.send(ask(number), frames)
    return (time.perf_counter() - started) / count


async def measure_loopback(endpoint: str, frames: list[bytes], rounds: int) -> list[Row]:
    """Trees up with acknowledgements, chunks down by request."""
    size = sum(map(len, frames))
    uploads: list[float] = []
    pulls: list[float] = []
    async with HubClient.connect(endpoint) as client:
        with anyio.fail_after(200):
            for _ in range(rounds):
                uploads.append(await keep_window(client, lambda n: TreeUpload(tree_id=str(n)), frames, 400))
                pulls.append(await keep_window(client, request_chunk, [], 100))
            await client.send(Goodbye(reason="measured"))
    upload_s, pull_s = min(uploads), min(pulls)
    return [
        Row("acked_gb_per_s", size / 1e9 / upload_s, f"trees of {size / 1e6:.1f} MB, window {WINDOW}, wall", ">= 1"),
        Row("acked_trees_per_s", 1 / upload_s, "the same in trees"),
        Row("chunk_gb_per_s", CHUNK_BYTES / 1e9 / pull_s, f"weights in 4 MiB chunks, window {WINDOW}, wall"),
    ]


def main() -> int:
    """Measure, print the table, print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds; under 50 s")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        anyio.run(serve, backend_options={"use_uvloop": True})
        return 0
    rounds = 8 if options.quick else 25
    rows = measure_codec(rounds)
    with hub_process() as endpoint:
        frames = encode_tree(make_tree(151_936))
        rows += anyio.run(measure_loopback, endpoint, frames, rounds, backend_options={"use_uvloop": True})
    print(
        f"{'figure':<34}{'measured':>12}  {'bar':<8}unit (CPU rates: best of {rounds} rounds; wall: best of {rounds})"
    )
    for row in rows:
        print(f"{row.name:<34}{row.value:>12.3f}  {row.bar:<8}{row.unit}")
    print(orjson.dumps({row.name: round(row.value, 4) for row in rows}).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
