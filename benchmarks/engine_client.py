"""What a call of the SGLang engine's client costs in CPU time: microseconds per request at 64 and 5,000 in flight,
beside plain aiohttp and httpx2 (httpx's successor) doing the same on the same stub server in another process.
`python -m benchmarks.engine_client [--quick]`; the last line is one JSON object."""

from __future__ import annotations

import argparse
import asyncio
import gc
import resource
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import cast

import aiohttp
import anyio
import httpx2
import numpy as np
import orjson

from actors.engines.sglang.answers import parse_answer
from actors.engines.sglang.client import Request, SglangClient
from matpo.config import Sampling
from protocols.records import Tokens

PROMPT_TOKENS, SAMPLED_TOKENS = 2_000, 500
SMALL, LARGE = 64, 5_000
STUB_DELAY_S = 1.0
"""The stub answers a request of the large round after so long, so that all of them are in flight together."""
Call = Callable[[], Awaitable[int]]


def stub_answer() -> bytes:
    """A finished reply of 500 tokens with log-probabilities."""
    random = np.random.default_rng(0)
    ids = random.integers(0, 151_936, SAMPLED_TOKENS).tolist()
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
    """The least HTTP server that keeps a connection open: every request gets the same reply, at once or later."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self._kept = b""
        body = stub_answer()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self._reply = head.encode() + body

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name

    def data_received(self, data: bytes) -> None:
        self._kept += data
        head, separator, body = self._kept.partition(b"\r\n\r\n")
        if not separator:
            return
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(body) >= length:
            self._kept = body[length:]
            asyncio.get_running_loop().call_later(self._delay_s, self._transport.write, self._reply)


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
    """CPU microseconds of this process per call, with `in_flight` tasks calling one after the other."""
    left = calls

    async def worker() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            assert await call() == SAMPLED_TOKENS

    gc.collect()
    began = time.process_time()
    async with anyio.create_task_group() as tasks:
        for _ in range(in_flight):
            tasks.start_soon(worker)
    return (time.process_time() - began) / calls * 1e6


def request(tokens: Tokens, number: int) -> Request:
    return Request(
        rid=f"{number:032x}",
        tokens=tokens,
        sampling=Sampling(max_tokens=SAMPLED_TOKENS),
        max_tokens=SAMPLED_TOKENS,
        ends=(1,),
        cache_key="0",
        stream_tokens=0,
    )


async def measure_ours(url: str, *, in_flight: int, calls: int) -> float:
    """The engine's client: request built, reply parsed to arrays."""
    tokens = np.random.default_rng(1).integers(0, 151_936, PROMPT_TOKENS).astype(np.int32)
    async with SglangClient.open(url) as client:

        async def call() -> int:
            total = 0
            async for content in client.generate(request(tokens, calls)):
                total += len(parse_answer(content, filtered=False).logprobs)
            return total

        await cpu_per_call(call, in_flight=in_flight, calls=in_flight)
        return await cpu_per_call(call, in_flight=in_flight, calls=calls)


async def measure_aiohttp(url: str, *, in_flight: int, calls: int) -> float:
    """aiohttp as its documentation shows it: json= and response.json()."""
    tokens = np.random.default_rng(1).integers(0, 151_936, PROMPT_TOKENS).tolist()
    body = {**orjson.loads(request(np.zeros(1, dtype=np.int32), 0).body()), "input_ids": tokens}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def call() -> int:
            async with session.post(f"{url}/generate", json=body) as response:
                reply = await response.json()
            return len(reply["meta_info"]["output_token_logprobs"])

        await cpu_per_call(call, in_flight=in_flight, calls=in_flight)
        return await cpu_per_call(call, in_flight=in_flight, calls=calls)


async def measure_httpx(url: str, *, in_flight: int, calls: int) -> float:
    """httpx2 as its documentation shows it."""
    tokens = np.random.default_rng(1).integers(0, 151_936, PROMPT_TOKENS).tolist()
    body = {**orjson.loads(request(np.zeros(1, dtype=np.int32), 0).body()), "input_ids": tokens}
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(limits=limits, timeout=120) as client:

        async def call() -> int:
            response = await client.post(f"{url}/generate", json=body)
            return len(response.json()["meta_info"]["output_token_logprobs"])

        await cpu_per_call(call, in_flight=in_flight, calls=in_flight)
        return await cpu_per_call(call, in_flight=in_flight, calls=calls)


async def measure(*, rounds: int, calls: int) -> dict[str, float]:
    """Figure → microseconds; the best of the rounds, which alternate between the clients."""
    found: dict[str, list[float]] = {name: [] for name in ("cpu_us_64", "aiohttp_cpu_us_64", "httpx_cpu_us_64")}
    with stub(0.0) as url:
        for _ in range(rounds):
            found["cpu_us_64"].append(await measure_ours(url, in_flight=SMALL, calls=calls))
            found["aiohttp_cpu_us_64"].append(await measure_aiohttp(url, in_flight=SMALL, calls=calls))
            found["httpx_cpu_us_64"].append(await measure_httpx(url, in_flight=SMALL, calls=max(200, calls // 4)))
    with stub(STUB_DELAY_S) as url:
        found["cpu_us_5000"] = [await measure_ours(url, in_flight=LARGE, calls=2 * LARGE) for _ in range(rounds)]
    return {name: round(min(values), 1) for name, values in found.items()}


def allow_connections(wanted: int) -> None:
    """Every request in flight is an open file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))


def main() -> int:
    """Measure, print the table, print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round; under a minute")
    parser.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    allow_connections(LARGE + 1_000)
    if options.serve is not None:
        anyio.run(serve, options.serve, backend_options={"use_uvloop": True})
        return 0
    rounds, calls = (1, 1_000) if options.quick else (5, 4_000)
    figures = anyio.run(lambda: measure(rounds=rounds, calls=calls), backend_options={"use_uvloop": True})
    bars = {"cpu_us_64": "≤ 150", "cpu_us_5000": "≤ 300"}
    print(f"{'figure':<20}{'CPU µs/call':>12}  bar   (prompt {PROMPT_TOKENS}, sampled {SAMPLED_TOKENS} tokens)")
    for name, value in figures.items():
        print(f"{name:<20}{value:>12.1f}  {bars.get(name, '')}")
    print(orjson.dumps(figures).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
