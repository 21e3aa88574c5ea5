"""`matpo tools bench`: how many calls a second a tool answers, how long they take and what they cost this process."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import anyio
from pydantic import JsonValue

from actors.tools.figures import Latencies
from actors.tools.plane import ToolPlane
from matpo.config import McpServer

LEVELS = (1, 16, 256)
"""Calls in flight."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One level."""

    in_flight: int
    calls: int
    failed: int
    calls_per_s: float
    cpu_ms: float
    """Of this process, for each call."""
    p50_ms: float
    p99_ms: float


def for_bench(entry: McpServer) -> McpServer:
    """The entry with room for the highest level, without record, and with every failure shown."""
    changes = {"max_inflight": max(LEVELS), "cache": "off", "idempotent": ()}
    return entry.model_copy(update={"matpo": entry.matpo.model_copy(update=changes)})


async def measure(
    plane: ToolPlane, name: str, arguments: Mapping[str, JsonValue], *, in_flight: int, seconds: float
) -> Measured:
    """Call one tool from `in_flight` tasks at a time, for about `seconds`."""
    latencies = Latencies()
    failed = 0
    began, began_cpu = time.perf_counter(), time.process_time()

    async def caller() -> None:
        nonlocal failed
        tools = plane.episode()
        while True:  # at least one call each, however slow the machine
            result = await tools.call(name, arguments)
            failed += result.outcome != "ok"
            latencies.add(result.seconds)
            if time.perf_counter() - began >= seconds:
                break
        tools.close()

    async with anyio.create_task_group() as tasks:
        for _ in range(in_flight):
            tasks.start_soon(caller)
    took, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    calls = latencies.count
    return Measured(
        in_flight=in_flight,
        calls=calls,
        failed=failed,
        calls_per_s=calls / took,
        cpu_ms=1e3 * cpu / calls,
        p50_ms=1e3 * latencies.quantile(0.5),
        p99_ms=1e3 * latencies.quantile(0.99),
    )
