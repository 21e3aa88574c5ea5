"""Planner and workers: parents, order, parallelism, recap, depth."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping

import anyio
from pydantic import JsonValue

from actors.agent import MAX_DEPTH
from actors.episode import play_episode
from actors.scene import Scene
from actors.workflows.planner_worker import planner_worker
from matpo.config import Sampling
from tests.actors.fakes import FakeTools, Say, call, last_message, settings, stage, task

ROLES: dict[str, dict[str, object]] = {
    "planner": {"system": "Plan.", "delegates": ["worker"], "max_context_tokens": 5_000},
    "worker": {
        "system": "Work.",
        "tools": ["search"],
        "max_context_tokens": 5_000,
        "report_message": "Report: {report}",
    },
}


async def find(arguments: Mapping[str, JsonValue]) -> str:
    return f"found {arguments['query']}"


def tools() -> FakeTools:
    return FakeTools({"search": (find, ("query",))})


async def test_workers_of_one_message_run_side_by_side_and_report_in_call_order() -> None:
    """The first worker can only finish after the second one has: were they run in turn, this would never end."""
    second_done, log = anyio.Event(), list[str]()

    async def script(prompt: str, sampling: Sampling) -> Say | str:
        message = last_message(prompt)
        if "Plan." in prompt:
            return "Both." if "Report" in message else call("worker", subtask="slow") + call("worker", subtask="quick")
        subtask = message.rsplit("Your subtask: ", 1)[1]
        log.append(f"{subtask} starts")
        if subtask == "slow":
            await second_done.wait()
        log.append(f"{subtask} ends")
        if subtask == "quick":
            second_done.set()
        return f"{subtask} result"

    on_stage, engine = stage(settings(ROLES), script, tools=tools())
    scene = Scene(on_stage, task(), "train", group_id="g")
    with anyio.fail_after(5):
        await planner_worker(scene)
    assert log == ["slow starts", "quick starts", "quick ends", "slow ends"]
    assert [(run.role, run.parent, run.subtask) for run in scene.runs] == [
        ("planner", None, None),
        ("worker", (0, 1), "slow"),
        ("worker", (0, 1), "quick"),
    ]
    reports = [turn for turn in scene.runs[0].talk.turns if turn.kind == "worker_report"]
    assert [turn.call_id for turn in reports] == ["0.1.0", "0.1.1"]
    text = on_stage.renderer.decode(engine.prompts[-1])
    assert text.index("Report: slow result") < text.index("Report: quick result")


async def test_a_worker_starts_afresh_with_the_recap_of_the_question() -> None:
    prompts: list[str] = []

    async def script(prompt: str, sampling: Sampling) -> Say | str:
        prompts.append(prompt)
        return {1: call("worker", subtask=" look {question} up "), 2: "fact"}.get(len(prompts), "Ann")

    on_stage, _ = stage(settings(ROLES), script, tools=tools())
    await planner_worker(Scene(on_stage, task("Who is {subtask}?"), "train", group_id="g"))
    assert prompts[1] == (
        "<|im_start|>system\nWork.<|im_end|>\n<|im_start|>user\nMain question: Who is {subtask}?\n"
        "Your subtask: look {question} up<|im_end|>\n<|im_start|>assistant\n"
    )
    assert last_message(prompts[2]) == "Report: fact"


async def test_without_recap_the_worker_sees_its_subtask_alone() -> None:
    prompts: list[str] = []

    async def script(prompt: str, sampling: Sampling) -> Say | str:
        prompts.append(prompt)
        return call("worker", subtask="look") if len(prompts) == 1 else "Ann"

    roles = {**ROLES, "worker": {**ROLES["worker"], "recap": False}}
    on_stage, _ = stage(settings(roles), script, tools=tools())
    await planner_worker(Scene(on_stage, task(), "train", group_id="g"))
    assert last_message(prompts[1]) == "look"


async def test_roles_may_only_call_what_they_were_given() -> None:
    async def script(prompt: str, sampling: Sampling) -> Say | str:
        message = last_message(prompt)
        if message == "Who?":
            return call("search", query="x")
        if "you have no tool 'search'" in message:
            return call("worker", subtask="x")
        if "subtask: x" in message:
            return call("worker", subtask="y")
        return "Ann"

    box = tools()
    on_stage, _ = stage(settings(ROLES), script, tools=box)
    scene = Scene(on_stage, task(), "train", group_id="g")
    await planner_worker(scene)
    assert not box.seen and len(scene.runs) == 2
    assert [(span.tool, span.outcome, span.server) for span in scene.spans] == [
        ("search", "model_error", ""),
        ("worker", "model_error", ""),
        ("worker", "ok", "agent"),
    ]


async def test_delegation_goes_to_any_depth_but_not_on_for_ever() -> None:
    async def script(prompt: str, sampling: Sampling) -> Say | str:
        message = last_message(prompt)
        return "stop" if "stand above one another" in message or "Report" in message else call("worker", subtask="x")

    roles = {**ROLES, "worker": {**ROLES["worker"], "delegates": ["worker"]}}
    on_stage, _ = stage(settings(roles), script, tools=tools())
    scene = Scene(on_stage, task(), "train", group_id="g")
    await planner_worker(scene)
    assert [run.parent for run in scene.runs] == [None, *[(depth, 1) for depth in range(MAX_DEPTH)]]
    assert {run.status for run in scene.runs} == {"done"}


async def test_a_worker_without_a_report_says_so_to_its_planner() -> None:
    async def script(prompt: str, sampling: Sampling) -> Say | str:
        message = last_message(prompt)
        if message == "Who?":
            return call("worker", subtask="x")
        return "Ann" if "without a report (turn limit)" in message else call("search", query="x")

    roles = {**ROLES, "worker": {**ROLES["worker"], "max_turns": 1}}
    on_stage, _ = stage(settings(roles), script, tools=tools())
    scene = Scene(on_stage, task(), "train", group_id="g")
    await planner_worker(scene)
    assert scene.runs[0].final == "Ann" and scene.runs[1].status == "turn_limit"


async def test_what_an_episode_held_is_free_when_it_ends_without_the_help_of_the_garbage_collector() -> None:
    """Thousands of episodes at once would otherwise wait in memory for the next full, slow collection."""

    async def script(prompt: str, sampling: Sampling) -> Say | str:
        message = last_message(prompt)
        if "Plan." in prompt:
            return "Done." if "Report" in message else call("worker", subtask="one") + call("worker", subtask="two")
        return "Found." if "found" in message else call("search", query="x")

    on_stage, _ = stage(settings(ROLES), script, tools=tools())
    gc.collect()
    gc.disable()
    try:
        scene = Scene(on_stage, task(), "train", group_id="g")
        await planner_worker(scene)
        assert [run.status for run in scene.runs] == ["done"] * 3
        planner = weakref.ref(scene.runs[0].talk)
        del scene
        assert planner() is None
    finally:
        gc.enable()


async def test_where_workers_are_scored_every_act_of_the_tree_earns_something_of_its_own() -> None:
    async def script(prompt: str, sampling: Sampling) -> Say | str:
        message = last_message(prompt)
        if "Plan." in prompt:
            return "Ann" if "Report" in message else call("worker", subtask="x")
        return "Found." if "found" in message else call("search", query="x") + "<tool_call>"

    config = settings(ROLES)
    config = config.model_copy(update={"rewards": config.rewards.model_copy(update={"workers": "format"})})
    on_stage, _ = stage(config, script, tools=tools())
    tree = await play_episode(task(), lease_id="l", group_id="g", episode=0, purpose="train", stage=on_stage)
    assert tree.earned == (1.0, 0.5)
