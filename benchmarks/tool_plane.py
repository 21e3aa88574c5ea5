"""What a call through our tool plane costs this process, beside the plain SDK on the same lean server."""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import anyio
import uvloop
from mcp import Client, StdioServerParameters
from pydantic import JsonValue

from actors.tools.plane import ToolPlane
from matpo.config import McpServer, Tools

IN_FLIGHT = 64
SERVER = [sys.executable, "-m", "benchmarks.lean_mcp"]
TEXT = "What is the population of the city in which the employer of Ada's mentor is based?"
Call = Callable[[], Awaitable[str]]


def plane(quick: bool) -> dict[str, JsonValue]:
    """`stdio_cpu_vs_sdk` and `http_cpu_vs_sdk`: our CPU time per call over the SDK's, medians of rounds in turns."""
    rounds, calls = (5, 600) if quick else (9, 4_000)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        stdio = runner.run(_compare(McpServer(command=SERVER[0], args=(*SERVER[1:], "stdio")), rounds, calls))
        with _http_server() as url:
            http = runner.run(_compare(McpServer(url=url), rounds, calls))
    return {
        "stdio_cpu_vs_sdk": round(statistics.median(ours / sdk for ours, sdk in stdio), 3),
        "stdio_cpu_ms": round(statistics.median(ours for ours, _ in stdio), 4),
        "http_cpu_vs_sdk": round(statistics.median(ours / sdk for ours, sdk in http), 3),
        "http_cpu_ms": round(statistics.median(ours for ours, _ in http), 4),
    }


async def _compare(entry: McpServer, rounds: int, calls: int) -> list[tuple[float, float]]:
    """CPU milliseconds per call, ours and the SDK's, for each round."""
    parameters = StdioServerParameters(command=SERVER[0], args=[*SERVER[1:], "stdio"])
    async with (
        ToolPlane.open(Tools(mcpServers={"lean": entry}), variables={}) as tools,
        Client(entry.url or parameters) as client,
    ):

        async def ours() -> str:
            return (await tools.call("lean__echo", {"text": TEXT})).text

        async def sdk() -> str:
            result = await client.call_tool("echo", {"text": TEXT})
            return str(result.content[0].model_dump()["text"])

        measured = []
        for number in range(rounds + 1):
            # Taking turns at being first, after one round to warm up.
            pair = (ours, sdk) if number % 2 else (sdk, ours)
            cost = {call: await _cpu_ms(call, calls) for call in pair}
            measured.append((cost[ours], cost[sdk]))
        return measured[1:]


async def _cpu_ms(call: Call, calls: int) -> float:
    left = calls

    async def caller() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            assert await call() == TEXT

    began = time.process_time()
    async with anyio.create_task_group() as tasks:
        for _ in range(IN_FLIGHT):
            tasks.start_soon(caller)
    return (time.process_time() - began) * 1e3 / calls


@contextmanager
def _http_server() -> Iterator[str]:
    with subprocess.Popen([*SERVER, "http"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()
