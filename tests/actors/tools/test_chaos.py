"""Three hundred episodes on one server that is killed, stopped, slow and noisy: calls end in time, episodes go on."""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from pathlib import Path

import anyio
import pytest
from pydantic import JsonValue

from actors.tools.plane import ToolPlane, ToolResult
from matpo.config import Tools
from tests.actors.tools.hosts import VARIABLES, entry

EPISODES = 300
CALLS = 6
EVERY = 150
"""Calls that are answered between two attacks, so that calls are under way at each of them."""
NAMED = re.compile(
    r"Error: the tool failed, not your call: .*'s'"
    r"( ended during the call|.* within .* s$| is down |: the answer was larger| sent an invalid result)"
)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SDK: JsonValue = {
    "command": "${PYTHON}",
    "args": [str(Path(__file__).with_name("sdk_server.py")), "stdio"],
    "matpo": {"bare_names": True, "idempotent": ["*"], "retries": 5, "timeout_s": 10},
}

Attack = Callable[[ToolPlane], Awaitable[None]]


async def played(plane: ToolPlane, tools: Sequence[str], attack: Attack) -> tuple[list[ToolResult], int]:
    """Every result of all episodes, each calling the tools in turn, and how many attacks there were meanwhile."""
    results: list[ToolResult] = []
    attacks = 0
    due = anyio.Event()

    async def episode(number: int) -> None:
        nonlocal due
        with closing(plane.episode()) as mine:
            for turn in range(CALLS):
                text = f"{number}.{turn}"
                result = await mine.call(tools[(number + turn) % len(tools)], {"text": text})
                assert result.outcome != "ok" or result.text in (text, "a\ufffdb"), "an answer to somebody else's call"
                results.append(result)
                if len(results) % EVERY == 0:
                    due.set()

    async def attacker() -> None:
        nonlocal due, attacks
        while len(results) < EPISODES * CALLS - EVERY:
            await due.wait()
            due = anyio.Event()
            await attack(plane)
            attacks += 1

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(attacker)
        async with anyio.create_task_group() as episodes:
            for number in range(EPISODES):
                episodes.start_soon(episode, number)
        tasks.cancel_scope.cancel()
    assert len(results) == EPISODES * CALLS
    return results, attacks


def by_signal(number: signal.Signals) -> Attack:
    """Send a signal to the server of the moment, as soon as it answers who it is."""

    async def attack(plane: ToolPlane) -> None:
        found = await plane.call("pid", {"text": ""})
        if found.outcome == "ok":
            os.kill(int(found.text), number)

    return attack


def judge(results: Sequence[ToolResult], *, timeout_s: float, retries: int) -> Counter[str]:
    """Check that everything ended in time and every failure has a name; returns the outcomes."""
    unnamed = [result.text for result in results if result.outcome != "ok" and not NAMED.match(result.text)]
    assert unnamed == []
    pauses_s = sum(0.2 * 3**number for number in range(retries))
    # Each attempt has its deadline; the rest is for a busy machine.
    assert max(result.seconds for result in results) < (retries + 1) * timeout_s + pauses_s + 10
    return Counter(result.outcome for result in results)


@pytest.mark.parametrize(
    ("server", "number", "timeout_s", "least"),
    [
        (entry(idempotent=["*"], retries=5, timeout_s=10), signal.SIGKILL, 10, 5),
        (SDK, signal.SIGKILL, 10, 5),
        (entry("--slow-start", "1", idempotent=["*"], retries=5, timeout_s=10), signal.SIGKILL, 10, 5),
        (entry("--modern", idempotent=["*"], retries=5, timeout_s=4, replicas=2), signal.SIGSTOP, 4, 1),
    ],
    ids=["killed", "killed, of the SDK", "killed, slow to start", "stopped"],
)
async def test_idempotent_calls_survive_attacks_on_their_server(
    server: JsonValue, number: signal.Signals, timeout_s: float, least: int
) -> None:
    tools = Tools.model_validate({"mcpServers": {"s": server}})
    async with ToolPlane.open(tools, variables=VARIABLES) as plane:
        results, attacks = await played(plane, ["echo"], by_signal(number))
        outcomes = judge(results, timeout_s=timeout_s, retries=5)
        assert (await plane.call("echo", {"text": "still here"})).text == "still here"
        (figures,) = plane.figures("a").servers
    assert attacks >= least and figures.losses >= least
    assert outcomes == {"ok": EPISODES * CALLS}


async def test_calls_that_may_not_be_repeated_fail_with_a_name_and_never_hang() -> None:
    tools = Tools.model_validate({"mcpServers": {"s": entry(timeout_s=10)}})
    async with ToolPlane.open(tools, variables=VARIABLES) as plane:
        results, attacks = await played(plane, ["echo"], by_signal(signal.SIGKILL))
        outcomes = judge(results, timeout_s=10, retries=0)
        assert (await plane.call("echo", {"text": "still here"})).text == "still here"
    assert attacks >= 5 and outcomes["ok"] > EPISODES * CALLS / 2


async def test_floods_junk_and_bad_schemas_cost_only_their_own_calls() -> None:
    async def flood(plane: ToolPlane) -> None:
        result = await plane.call("flood", {"text": ""})
        assert (result.outcome, NAMED.match(result.text) is not None) == ("infrastructure", True)

    tools = Tools.model_validate({"mcpServers": {"s": entry("--bad-schema")}})
    async with ToolPlane.open(tools, variables=VARIABLES) as plane:
        results, attacks = await played(plane, ["echo", "junk", "bad_utf8"], flood)
        assert judge(results, timeout_s=30, retries=0) == {"ok": EPISODES * CALLS}
        (figures,) = plane.figures("a").servers
    assert attacks >= 1 and figures.losses == 0
