"""Copies of a server: shared ones that stand in for each other, and one of its own for every episode."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from pathlib import Path

import anyio
import pytest

from actors.tools.plane import EpisodeTools, ToolPlane, ToolResult
from matpo.config import Tools
from matpo.errors import UserError
from tests.actors.tools.hosts import call, hostile


async def pid(tools: EpisodeTools) -> int:
    """Of the server that an episode's calls reach."""
    return int((await tools.call("pid", {"text": ""})).text)


async def wait_gone(process: int) -> None:
    """Until a process is no more."""
    try:
        handle = os.pidfd_open(process)
    except ProcessLookupError:
        return
    try:
        await anyio.wait_readable(handle)
    finally:
        os.close(handle)


async def test_calls_go_to_the_copy_with_the_fewest_under_way() -> None:
    async with hostile(replicas=3, max_inflight=2) as plane:
        assert len({(await call(plane, "pid")).text for _ in range(3)}) == 3
        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(call, plane, "slow", "0.3")
            await anyio.wait_all_tasks_blocked()
            assert len({(await call(plane, "pid")).text for _ in range(4)}) == 1
    (server,) = plane.figures("a").servers
    assert (server.copies, server.losses) == (3, 0)


async def test_one_broken_copy_fails_no_calls_of_the_others() -> None:
    async with hostile(replicas=2) as plane:
        broken = int((await call(plane, "pid")).text)
        os.kill(broken, signal.SIGKILL)
        while not plane.figures("a").servers[0].losses:
            await call(plane, "pid")
        results = [await call(plane, "pid") for _ in range(20)]
        assert {result.outcome for result in results} == {"ok"}
        assert str(broken) not in {result.text for result in results}


async def test_an_idempotent_call_that_hangs_is_made_again_on_another_copy() -> None:
    async with hostile(replicas=2, idempotent=["echo"], retries=1, timeout_s=0.4) as plane:
        os.kill(int((await call(plane, "pid")).text), signal.SIGSTOP)
        assert {(await call(plane, "echo")).outcome for _ in range(4)} == {"ok"}


async def test_every_episode_has_a_server_of_its_own_until_it_ends() -> None:
    async with hostile(scope="episode") as plane:
        with closing(plane.episode()) as first, closing(plane.episode()) as second:
            mine, other = await pid(first), await pid(second)
            assert await pid(first) == mine != other
            assert plane.figures("a").servers[0].copies == 2
        await wait_gone(mine)
        await wait_gone(other)
        assert plane.figures("a").servers[0].copies == 0


async def test_calls_of_one_episode_that_start_together_share_its_server() -> None:
    async with hostile(scope="episode") as plane:
        with closing(plane.episode()) as tools:
            found: list[int] = []
            async with anyio.create_task_group() as tasks:

                async def one() -> None:
                    found.append(await pid(tools))

                for _ in range(4):
                    tasks.start_soon(one)
            assert len(set(found)) == 1


async def test_an_episode_that_lost_its_server_is_told_so_and_others_are_not() -> None:
    async with hostile(scope="episode") as plane:
        with closing(plane.episode()) as first, closing(plane.episode()) as second:
            process = await pid(second)
            crashed = await first.call("crash", {"text": ""})
            later = await first.call("echo", {"text": "x"})
            assert (crashed.outcome, later.outcome) == ("infrastructure", "infrastructure")
            assert "has ended, and with it what it held" in later.text
            assert await pid(second) == process


async def test_no_more_than_max_episodes_have_a_server_at_a_time() -> None:
    async with hostile(scope="episode", max_episodes=1, start_timeout_s=3) as plane:
        second = plane.episode()
        with closing(plane.episode()) as first:
            mine = await pid(first)
            refused = await second.call("pid", {"text": ""})
            assert (refused.outcome, "at most 1 episodes" in refused.text) == ("infrastructure", True)
        with closing(second):
            assert await pid(second) != mine


async def test_a_server_without_room_for_all_episodes_is_refused() -> None:
    entry = {"command": "x", "matpo": {"scope": "episode", "max_episodes": 8}}
    tools = Tools.model_validate({"mcpServers": {"own": entry}})
    with pytest.raises(UserError) as caught:
        async with ToolPlane.open(tools, variables={}, episodes=9):
            pass
    assert str(caught.value) == (
        "tool server 'own' has room for 8 episodes and 9 are played at a time; set its matpo.max_episodes to 9, or"
        " actor.concurrency lower"
    )


async def test_a_server_of_an_episode_that_does_not_start_fails_its_calls_alone(tmp_path: Path) -> None:
    async with hostile("--only-once", str(tmp_path / "started"), scope="episode") as plane:
        result = await call(plane, "echo")
        assert (result.outcome, "not again" in result.text) == ("infrastructure", True)


@pytest.mark.parametrize("scope", ["shared", "episode"])
async def test_a_plane_that_closes_leaves_no_server_behind(scope: str) -> None:
    results: list[ToolResult] = []
    async with hostile(scope=scope) as plane:
        tools = plane.episode()
        results.append(await tools.call("pid", {"text": ""}))
    with anyio.fail_after(5):
        await wait_gone(int(results[0].text))
