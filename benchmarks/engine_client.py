"""What a call of the SGLang engine's client costs in CPU time, request built and reply parsed to checked arrays:
microseconds per call at 64 and 5,000 in flight, and those of the whole `engine.generate`. Beside them, on the same stub
server in another process: plain aiohttp and httpx2 (httpx's successor) as their documentation shows them, and aiohttp
at its leanest with our own request and parser, which is what remains of the difference.
`python -m benchmarks.engine_client [--quick]`; the last line is one JSON object."""

from __future__ import annotations

import argparse
import asyncio
import gc
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Protocol, cast
from uuid import uuid4

import aiohttp
import anyio
import httpx2
import numpy as np
import orjson

from actors.engines.sglang.answers import parse_answer
from actors.engines.sglang.client import Request, SglangClient
from actors.engines.sglang.engine import SglangEngine
from actors.engines.sglang.progress import Progress, Reply
from actors.limits import allow_open_files
from matpo.config import Sampling
from matpo.config import SglangEngine as Settings
from protocols.records import Tokens
from protocols.weights import Tensor, write_keyframe

PROMPT_TOKENS, SAMPLED_TOKENS = 2_000, 500
VOCABULARY = 151_936
SAMPLING = Sampling(max_tokens=SAMPLED_TOKENS)
SMALL, LARGE = 64, 5_000
STUB_DELAY_S = 1.0
"""The stub answers a request of the large round after so long, so that all of them are in flight together."""
Call = Callable[[], Awaitable[int]]


class Measure(Protocol):
    async def __call__(self, url: str, *, in_flight: int, calls: int) -> float: ...


OFFERED = ("/generate", "/abort_request", "/pause_generation", "/continue_generation", "/begin_weight_update")
SUCCESS = orjson.dumps({"success": True, "message": "", "paths": {path: {} for path in OFFERED}})
"""Answers whatever is not a prompt."""


@cache
def stub_answer() -> bytes:
    """A finished reply of 500 tokens with log-probabilities."""
    random = np.random.default_rng(0)
    ids = random.integers(0, VOCABULARY, SAMPLED_TOKENS).tolist()
    rows = [[-float(p), token, None] for p, token in zip(random.exponential(1.0, SAMPLED_TOKENS), ids, strict=True)]
    meta = {
        "finish_reason": {"type": "length", "length": SAMPLED_TOKENS},
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": SAMPLED_TOKENS,
        "cached_tokens": 0,
        "weight_version": "7",
        "weight_versions": [{"version": "7", "start": 0, "end": SAMPLED_TOKENS}],
        "output_token_logprobs": rows,
    }
    return orjson.dumps({"output_ids": ids, "meta_info": meta})


class Stub(asyncio.Protocol):
    """The least HTTP server that keeps a connection open: every prompt gets the same reply, at once or later."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self._kept = b""
        self._answer, self._success = _response(stub_answer()), _response(SUCCESS)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name

    def data_received(self, data: bytes) -> None:
        self._kept += data
        head, separator, body = self._kept.partition(b"\r\n\r\n")
        if not separator:
            return
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
        if len(body) < length:
            return
        self._kept = body[length:]
        if head.startswith(b"POST /generate"):
            asyncio.get_running_loop().call_later(self._delay_s, self._transport.write, self._answer)
        else:
            self._transport.write(self._success)


def _response(body: bytes) -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def serve(delay_s: float) -> None:
    """Print the port and answer until killed."""
    server = await asyncio.get_running_loop().create_server(lambda: Stub(delay_s), "127.0.0.1", 0, backlog=8_192)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextmanager
def stub(delay_s: float) -> Iterator[str]:
    """URL of a stub server in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.engine_client", "--serve", str(delay_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


async def cpu_per_call(call: Call, *, in_flight: int, calls: int) -> float:
    """CPU microseconds of this process per call, with `in_flight` tasks calling one after the other. A first round
    opens the connections and is not counted."""
    await _call(call, in_flight=in_flight, calls=in_flight)
    gc.collect()
    began = time.process_time()
    await _call(call, in_flight=in_flight, calls=calls)
    return (time.process_time() - began) / calls * 1e6


async def _call(call: Call, *, in_flight: int, calls: int) -> None:
    left = calls

    async def worker() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            assert await call() == SAMPLED_TOKENS

    async with anyio.create_task_group() as tasks:
        for _ in range(in_flight):
            tasks.start_soon(worker)


def request(tokens: Tokens) -> Request:
    return Request(
        rid=uuid4().hex,
        tokens=tokens,
        sampling=SAMPLING,
        max_tokens=SAMPLED_TOKENS,
        ends=(1,),
        cache_key="0",
        stream_tokens=0,
    )


def prompt() -> Tokens:
    return np.random.default_rng(1).integers(0, VOCABULARY, PROMPT_TOKENS).astype(np.int32)


async def measure_ours(url: str, *, in_flight: int, calls: int) -> float:
    """What the engine does for a call: request built and sent, reply parsed, checked and joined to arrays."""
    tokens = prompt()
    async with SglangClient.open(url) as client:

        async def call() -> int:
            wanted, reply, progress = request(tokens), Reply(sent_with=7), Progress(tokens)
            reply.take(parse_answer(await client.answer(wanted), filtered=wanted.filtered))
            reply.finish(progress)
            return len(progress.generation("length").logprobs)

        return await cpu_per_call(call, in_flight=in_flight, calls=calls)


async def measure_engine(url: str, *, in_flight: int, calls: int) -> float:
    """The same with everything around it: deadline, checks, waiting for the server to be usable, counters."""
    tokens = prompt()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = {"model.embed_tokens.weight": Tensor("float32", np.zeros((VOCABULARY, 1), dtype=np.float32))}
        write_keyframe(folder / "model.safetensors", weights, version=7)
        (folder / "config.json").write_bytes(
            orjson.dumps({"vocab_size": VOCABULARY, "tie_word_embeddings": True, "eos_token_id": 1})
        )
        settings = Settings(urls=(url,), attest=False)
        async with SglangEngine.open(folder, settings, seed=0) as engine:
            await engine.load(weights, version=7)

            async def call() -> int:
                return len((await engine.generate(tokens, SAMPLING, deadline_s=120)).logprobs)

            return await cpu_per_call(call, in_flight=in_flight, calls=calls)


async def measure_aiohttp(url: str, *, in_flight: int, calls: int) -> float:
    """aiohttp as its documentation shows it: json= and response.json()."""
    body = {**orjson.loads(request(np.zeros(1, dtype=np.int32)).body()), "input_ids": prompt().tolist()}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def call() -> int:
            async with session.post(f"{url}/generate", json=body) as response:
                reply = await response.json()
            return len(reply["meta_info"]["output_token_logprobs"])

        return await cpu_per_call(call, in_flight=in_flight, calls=calls)


async def measure_lean_aiohttp(url: str, *, in_flight: int, calls: int) -> float:
    """aiohttp without cookies, decompression and default headers, on our request and parser."""
    tokens, address = prompt(), f"{url}/generate"
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"Content-Type": "application/json"},
        skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent"),
        auto_decompress=False,
        read_bufsize=2**18,
    ) as session:

        async def call() -> int:
            async with session.post(address, data=request(tokens).body()) as response:
                content = await response.read()
            return len(parse_answer(content, filtered=False).logprobs)

        return await cpu_per_call(call, in_flight=in_flight, calls=calls)


async def measure_httpx(url: str, *, in_flight: int, calls: int) -> float:
    """httpx2 as its documentation shows it."""
    body = {**orjson.loads(request(np.zeros(1, dtype=np.int32)).body()), "input_ids": prompt().tolist()}
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(limits=limits, timeout=120) as client:

        async def call() -> int:
            response = await client.post(f"{url}/generate", json=body)
            return len(response.json()["meta_info"]["output_token_logprobs"])

        return await cpu_per_call(call, in_flight=in_flight, calls=calls)


SMALL_ROUND: Mapping[str, Measure] = {
    "cpu_us_64": measure_ours,
    "engine_cpu_us_64": measure_engine,
    "lean_aiohttp_cpu_us_64": measure_lean_aiohttp,
    "aiohttp_cpu_us_64": measure_aiohttp,
    "httpx_cpu_us_64": measure_httpx,
}
LARGE_ROUND: Mapping[str, Measure] = {
    "cpu_us_5000": measure_ours,
    "engine_cpu_us_5000": measure_engine,
    "lean_aiohttp_cpu_us_5000": measure_lean_aiohttp,
}


async def measure(*, rounds: int, calls: int) -> dict[str, float]:
    """Figure → microseconds; the best of the rounds, which alternate between the clients."""
    found: dict[str, list[float]] = {name: [] for name in (*SMALL_ROUND, *LARGE_ROUND)}
    with stub(0.0) as url:
        for _ in range(rounds):
            for name, client in SMALL_ROUND.items():
                found[name].append(await client(url, in_flight=SMALL, calls=calls))
    with stub(STUB_DELAY_S) as url:
        for _ in range(rounds):
            for name, client in LARGE_ROUND.items():
                found[name].append(await client(url, in_flight=LARGE, calls=2 * LARGE))
    return {name: round(min(values), 1) for name, values in found.items()}


def main() -> int:
    """Measure, print the table, print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round; under a minute")
    parser.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    allow_open_files(LARGE)
    if options.serve is not None:
        anyio.run(serve, options.serve, backend_options={"use_uvloop": True})
        return 0
    rounds, calls = (1, 1_000) if options.quick else (5, 3_000)
    figures = anyio.run(lambda: measure(rounds=rounds, calls=calls), backend_options={"use_uvloop": True})
    bars = {"cpu_us_64": "≤ 150", "cpu_us_5000": "≤ 300"}
    print(f"{'figure':<26}{'CPU µs/call':>12}  bar   (prompt {PROMPT_TOKENS}, sampled {SAMPLED_TOKENS} tokens)")
    for name, value in figures.items():
        print(f"{name:<26}{value:>12.1f}  {bars.get(name, '')}")
    print(orjson.dumps(figures).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
