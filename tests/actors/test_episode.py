"""A whole episode: the tree it leaves, its reward, and what becomes of it when something breaks."""

from __future__ import annotations

from collections.abc import Mapping

import anyio
import numpy as np
import pytest
from pydantic import JsonValue

from actors.engines.engine import EngineFailure
from actors.episode import play_episode
from actors.scene import Stage
from actors.tools.plane import ToolResult
from matpo.config import Sampling
from protocols.messages import Purpose
from protocols.records import EpisodeTree, WeightStamp, version_of
from tests.actors.fakes import FakeTools, Say, Script, call, last_message, result, settings, stage, task

ROLES: dict[str, dict[str, object]] = {
    "planner": {"system": "Plan.", "delegates": ["worker"], "max_context_tokens": 5_000},
    "worker": {"system": "Work.", "tools": ["search"], "max_context_tokens": 5_000},
}


async def find(arguments: Mapping[str, JsonValue]) -> str:
    return "Ann"


async def well_played(prompt: str, sampling: Sampling) -> Say | str:
    message = last_message(prompt)
    if message == "Who?":
        return call("worker", subtask="find out")
    if "subtask: find out" in message:
        return call("search", query="who")
    return "It is \\boxed{Ann}." if "Plan." in prompt else "Ann"


async def played(on_stage: Stage, purpose: Purpose = "train") -> EpisodeTree:
    with anyio.fail_after(10):
        return await play_episode(
            task(), lease_id="lease", group_id="group", episode=2, purpose=purpose, stage=on_stage
        )


def open_stage(script: Script, tools: FakeTools | None = None, **episode: object) -> Stage:
    return stage(settings(ROLES, **episode), script, tools=tools or FakeTools({"search": (find, ("query",))}))[0]


async def test_a_good_episode_leaves_a_scored_tree_with_everything_in_it() -> None:
    tree = await played(open_stage(well_played))
    assert [(t.role, t.parent, t.status) for t in tree.trajectories] == [
        ("planner", None, "done"),
        ("worker", (0, 1), "done"),
    ]
    assert (tree.lease_id, tree.group_id, tree.episode, tree.actor_id) == ("lease", "group", 2, "actor-0")
    assert tree.rewards == {
        "answer": 1.0, "format": 1.0, "format_planner": 1.0, "format_worker": 1.0, "reading": None,
        "steps": 4.0, "spawned": 1.0, "total": 1.0,
    }  # fmt: skip
    assert tree.weights == (WeightStamp(version=3, digest="digest-3"),)
    assert [(span.trajectory, span.server) for span in tree.tool_spans] == [(1, "search_server"), (0, "agent")]
    assert all(span.started_s >= 0 and span.started_s + span.seconds <= tree.seconds for span in tree.tool_spans)


async def test_log_probabilities_belong_to_the_sampled_tokens_alone() -> None:
    tree = await played(open_stage(well_played))
    for trajectory in tree.trajectories:
        assert np.count_nonzero(trajectory.sampled) == len(trajectory.logprobs)
        assert set(trajectory.logprobs.tolist()) == {-0.5}


async def test_tokens_sampled_before_and_after_a_weight_swap_carry_their_own_versions_and_both_digests() -> None:
    new = version_of(lineage=1, step=4)

    async def script(prompt: str, sampling: Sampling) -> Say | str:
        return Say("\\boxed{Ann}", new_version=new)

    tree = await played(open_stage(script))
    assert tree.trajectories[0].versions.tolist() == [3] * 6 + [new] * 6
    assert tree.versions == (3, new) and {w.digest for w in tree.weights} == {"digest-3", f"digest-{new}"}


async def test_a_refused_call_of_the_planner_costs_half_of_its_half_of_the_format_reward() -> None:
    async def script(prompt: str, sampling: Sampling) -> Say | str:
        if last_message(prompt) == "Who?":
            return call("worker", subtask="find out") + "<tool_call>"
        return "\\boxed{Ann}" if "Plan." in prompt else "Ann"

    tree = await played(open_stage(script))
    assert tree.rewards["format_planner"] == 0.5 and tree.rewards["format_worker"] == 1.0
    assert tree.reward == pytest.approx(0.9 + 0.1 * (0.5 * 0.5 + 0.5 * 1.0))


async def test_an_episode_that_lasts_too_long_is_cancelled_and_not_scored() -> None:
    never = anyio.Event()

    async def script(prompt: str, sampling: Sampling) -> Say | str:
        if "Work." in prompt:
            await never.wait()
        return call("worker", subtask="find out")

    tree = await played(open_stage(script, timeout_s=0.05))
    assert [t.status for t in tree.trajectories] == ["cancelled", "cancelled"]
    assert set(tree.rewards.values()) == {None} and tree.reward is None


async def test_finished_agents_of_a_cancelled_episode_keep_their_status() -> None:
    never = anyio.Event()

    async def script(prompt: str, sampling: Sampling) -> Say | str:
        message = last_message(prompt)
        if "subtask: slow" in message:
            await never.wait()
        return "done" if "Work." in prompt else call("worker", subtask="quick") + call("worker", subtask="slow")

    tree = await played(open_stage(script, timeout_s=0.05))
    assert [t.status for t in tree.trajectories] == ["cancelled", "done", "cancelled"]


async def test_a_tool_outage_leaves_the_episode_unscored() -> None:
    async def down(arguments: Mapping[str, JsonValue]) -> ToolResult:
        return result("search is down", "infrastructure")

    tree = await played(open_stage(well_played, FakeTools({"search": (down, ("query",))})))
    assert [t.status for t in tree.trajectories] == ["done", "tool_failure"]
    assert tree.rewards["total"] is None and tree.rewards["answer"] is None


async def test_a_dead_engine_leaves_the_episode_unscored_and_raises_nothing() -> None:
    async def script(prompt: str, sampling: Sampling) -> Say | str:
        raise EngineFailure("gone")

    tree = await played(open_stage(script))
    assert tree.trajectories[0].status == "engine_failure" and tree.reward is None


async def test_a_cancelled_call_returns_nothing() -> None:
    started = anyio.Event()

    async def script(prompt: str, sampling: Sampling) -> Say | str:
        started.set()
        await anyio.Event().wait()
        return ""

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(played, open_stage(script))
        with anyio.fail_after(5):
            await started.wait()
        tasks.cancel_scope.cancel()


async def test_many_episodes_share_a_stage_without_mixing() -> None:
    on_stage = open_stage(well_played)
    trees: list[EpisodeTree] = []

    async def one() -> None:
        trees.append(await played(on_stage))

    async with anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(one)
    assert len({tree.tree_id for tree in trees}) == 20
    assert {tree.token_count for tree in trees} == {trees[0].token_count}
