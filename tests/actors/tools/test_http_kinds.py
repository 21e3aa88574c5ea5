"""The plane against a real server of the SDK over both kinds of HTTP."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import anyio
import pytest
import structlog
from pydantic import JsonValue

from actors.tools.plane import ToolPlane
from matpo.config import Tools

SERVER = str(Path(__file__).with_name("sdk_server.py"))
KINDS = pytest.mark.parametrize("kind", ["http", "sse"])
pytestmark = pytest.mark.slow


@contextmanager
def serving(kind: str, port: str = "0") -> Iterator[tuple[str, subprocess.Popen[str]]]:
    with subprocess.Popen([sys.executable, SERVER, kind, port], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip(), process
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()


@asynccontextmanager
async def reached(url: str, kind: str, **extras: JsonValue) -> AsyncIterator[ToolPlane]:
    entry = {"url": url, "type": kind, "matpo": {"bare_names": True, **extras}}
    tools = Tools.model_validate({"mcpServers": {"echo": entry}})
    with anyio.fail_after(40):
        async with ToolPlane.open(tools, variables={}) as plane:
            yield plane


@KINDS
async def test_calls_many_at_a_time_work_and_errors_have_their_kind(kind: str) -> None:
    with serving(kind) as (url, _):
        async with reached(url, kind) as plane:
            texts: list[str] = []
            async with anyio.create_task_group() as tasks:

                async def one(number: int) -> None:
                    texts.append((await plane.call("echo", {"text": str(number)})).text)

                for number in range(50):
                    tasks.start_soon(one, number)
            assert sorted(texts, key=int) == [str(number) for number in range(50)]
            failed = await plane.call("fail", {})
            assert (failed.outcome, "Error executing tool fail" in failed.text) == ("model_error", True)


@KINDS
async def test_a_call_that_is_too_slow_fails_alone(kind: str) -> None:
    with serving(kind) as (url, _):
        async with reached(url, kind, timeout_s=0.5) as plane:
            slow = await plane.call("slow", {"seconds": 60})
            assert (slow.outcome, slow.seconds < 2) == ("infrastructure", True)
            assert (await plane.call("echo", {"text": "on"})).text == "on"


@KINDS
async def test_a_flood_fails_its_own_call_and_not_those_beside_it(kind: str) -> None:
    with serving(kind) as (url, _):
        async with reached(url, kind, max_result_bytes=100_000) as plane:
            beside: list[str] = []
            async with anyio.create_task_group() as tasks:

                async def other() -> None:
                    beside.append((await plane.call("slow", {"seconds": 0.5})).outcome)

                tasks.start_soon(other)
                assert (await plane.call("long", {"size": 1_500_000})).text.endswith("100,000 shown]")
                assert (await plane.call("long", {"size": 20_000_000})).outcome == "infrastructure"
            assert beside == ["ok"]
            assert (await plane.call("echo", {"text": "on"})).text == "on"


@KINDS
async def test_a_frozen_server_costs_each_call_its_deadline_and_works_when_it_wakes(kind: str) -> None:
    with serving(kind) as (url, process):
        async with reached(url, kind, timeout_s=0.5, start_timeout_s=1, idempotent=["long"], retries=5) as plane:
            await plane.call("freeze", {})
            outcomes: list[str] = []
            async with anyio.create_task_group() as tasks:

                async def stuck() -> None:
                    outcomes.append((await plane.call("echo", {"text": "x" * 20_000})).outcome)

                for _ in range(40):
                    tasks.start_soon(stuck)
            assert outcomes == ["infrastructure"] * 40
            process.send_signal(signal.SIGCONT)
            assert (await plane.call("long", {"size": 1})).text == "x"


@KINDS
async def test_a_server_that_is_killed_is_found_again(kind: str) -> None:
    with serving(kind) as (url, process):
        port = url.split(":")[2].split("/")[0]
        async with reached(url, kind, timeout_s=3, idempotent=["echo"], retries=5) as plane:
            assert (await plane.call("echo", {"text": "on"})).text == "on"
            process.kill()
            process.wait()
            assert (await plane.call("slow", {"seconds": 0})).outcome == "infrastructure"
            with serving(kind, port):
                assert (await plane.call("echo", {"text": "on"})).text == "on"


async def test_new_tools_of_a_server_that_must_be_listened_to_are_noticed() -> None:
    with serving("http") as (url, _), structlog.testing.capture_logs() as logs:
        async with reached(url, "http") as plane:
            learned = 0
            while not logs:
                # What is announced before the plane listens reaches nobody.
                await plane.call("learn", {"name": f"new_{learned}"})
                learned += 1
                await plane.call("slow", {"seconds": 0.05})
    assert logs[0]["event"] == "tool server changed its tools; prompts keep the old ones"
    assert "new_0" in logs[0]["added"]
