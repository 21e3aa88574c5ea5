"""One role's turn loop: permissions, feedback, limits, summaries, reports, masks."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from pydantic import JsonValue

from actors.agent import MAX_CALLS_PER_TURN, Agent, Report
from actors.engines.engine import EngineFailure
from actors.scene import Scene
from actors.tools.plane import ToolResult
from matpo.config import Sampling
from matpo.errors import UserError
from tests.actors.fakes import (
    FakeTools,
    Say,
    Script,
    byte_tokenizer,
    call,
    decoded,
    last_message,
    result,
    settings,
    stage,
    task,
)

SOLVER: dict[str, object] = {"system": "Solve.", "tools": ["search"], "max_context_tokens": 5_000}

LONG = {**SOLVER, "max_context_tokens": 10_000, "sampling": {"max_tokens": 5_000}}


async def find(arguments: Mapping[str, JsonValue]) -> str:
    return f"found {arguments['query']}"


SEARCH = FakeTools({"search": (find, ("query",)), "code": (find, ("query",))})


def says(*messages: Say | str) -> Script:
    """Says these, one per turn."""
    left = list(messages)

    async def script(prompt: str, sampling: Sampling) -> Say | str:
        return left.pop(0)

    return script


async def play(script: Script, role: Mapping[str, object] = SOLVER, **episode: object) -> tuple[Agent, Scene, Report]:
    on_stage, _ = stage(settings({"solver": role}, workflow="single_agent", **episode), script, tools=SEARCH)
    scene = Scene(on_stage, task(), "train", group_id="g")
    agent = Agent(scene, "solver", "Who?")
    return agent, scene, await agent.play()


def transcript(agent: Agent) -> list[tuple[str, str]]:
    tokens = agent.run.talk.tokens
    return [(turn.kind, decoded(byte_tokenizer(), tokens[turn.start : turn.stop])) for turn in agent.run.talk.turns]


async def test_a_tool_call_is_run_and_its_result_read_before_the_final_message() -> None:
    agent, scene, report = await play(says(call("search", query="Ann"), "It is Ann."))
    assert transcript(agent) == [
        ("prompt", "<|im_start|>system\nSolve.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"),
        ("sampled", call("search", query="Ann") + "<|im_end|>"),
        ("tool_result", "\n<|im_start|>tool\nfound Ann<|im_end|>\n<|im_start|>assistant\n"),
        ("sampled", "It is Ann.<|im_end|>"),
    ]
    assert report == Report("It is Ann.", "ok") and agent.run.status == "done"
    assert [(span.call_id, span.server, span.outcome, span.turn) for span in scene.spans] == [
        ("0.1.0", "search_server", "ok", 1)
    ]


async def test_results_speak_as_the_user_where_the_config_says_so() -> None:
    agent, _, _ = await play(says(call("search", query="Ann"), "Ann"), results_as="user")
    assert transcript(agent)[2] == ("tool_result", "\n<|im_start|>user\nfound Ann<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("<tool_call>{", "your <tool_call> block is not closed; end it with </tool_call>"),
        ("<tool_call>no</tool_call>", "the tool call is not valid JSON"),
        (call("code", query="x"), "you have no tool 'code'; you may call search"),
        (call("search"), "tool 'search' needs the argument 'query'; it takes query"),
        (call("search", query="x", site="y"), "tool 'search' has no argument 'site'; it takes query"),
    ],
)
async def test_a_call_that_cannot_be_run_is_answered_with_what_to_fix(message: str, told: str) -> None:
    SEARCH.seen.clear()
    agent, scene, _ = await play(says(message, "Ann"))
    assert f"tool\nError: {told}" in transcript(agent)[2][1]
    assert [(span.outcome, span.server) for span in scene.spans] == [("model_error", "")]
    assert agent.run.status == "done" and not SEARCH.seen


async def test_calls_beyond_the_most_per_message_are_refused() -> None:
    agent, scene, _ = await play(says(call("search", query="x") * (MAX_CALLS_PER_TURN + 2), "Ann"), LONG)
    assert [span.server for span in scene.spans].count("") == 2
    assert "make fewer" in transcript(agent)[-2][1]


async def test_turns_are_limited_and_results_nobody_will_read_are_not_appended() -> None:
    agent, _, report = await play(says(*[call("search", query="x")] * 2), {**SOLVER, "max_turns": 2})
    assert agent.run.status == "turn_limit"
    assert [kind for kind, _ in transcript(agent)] == ["prompt", "sampled", "tool_result", "sampled"]
    assert report.outcome == "model_error" and "turn limit" in report.text


async def test_the_summary_after_the_turn_limit_reads_the_last_results_and_is_the_report() -> None:
    role = {**SOLVER, "max_turns": 1, "summary": "always", "summary_instruction": "Report.",
            "summary_failed_instruction": "You failed on {question} Report."}  # fmt: skip
    agent, _, report = await play(
        says(call("search", query="x"), f"<think>hm</think>So. {call('search', query='y')}"), role
    )
    assert transcript(agent)[2:] == [
        ("tool_result", "\n<|im_start|>tool\nfound x<|im_end|>\n"),
        ("instruction", "<|im_start|>user\nYou failed on Who? Report.<|im_end|>\n<|im_start|>assistant\n"),
        ("sampled", f"<think>hm</think>So. {call('search', query='y')}<|im_end|>"),
    ]
    assert report == Report("So.", "ok") and agent.run.status == "turn_limit"


async def test_a_worker_that_is_done_is_asked_for_its_summary_with_the_plain_instruction() -> None:
    role = {**SOLVER, "summary": "always", "summary_instruction": "Report.", "summary_failed_instruction": "Failed."}
    agent, _, report = await play(says("done", "Ann it is"), role)
    assert "user\nReport.<|im_end|>" in transcript(agent)[2][1]
    assert report.text == "Ann it is" and agent.run.status == "done"


async def test_on_overflow_summarises_only_when_context_ran_out() -> None:
    role = {**SOLVER, "summary": "on_overflow", "summary_reserve_tokens": 20, "summary_instruction": "Report."}
    _, _, report = await play(says("done"), role)
    assert report.text == "done"
    tight = {**role, "max_context_tokens": 280}
    agent, _, report = await play(says(call("search", query="x" * 60), "Ann"), tight)
    assert agent.run.status == "context_limit" and report.text == "Ann"
    assert [kind for kind, _ in transcript(agent)] == ["prompt", "sampled", "instruction", "sampled"]
    assert len(agent.run.talk) <= 280


async def test_sampling_never_exceeds_what_context_leaves() -> None:
    agent, _, _ = await play(says("y" * 200), {**SOLVER, "max_context_tokens": 100, "sampling": {"max_tokens": 256}})
    assert len(agent.run.talk) == 100 and agent.run.status == "context_limit"
    assert agent.run.talk.turns[-1].stop_reason == "context"


async def test_a_message_cut_by_its_own_limit_is_closed_before_the_next_one() -> None:
    role = {**SOLVER, "sampling": {"max_tokens": 11}}
    agent, _, _ = await play(says("<tool_call>{and so on", "Ann"), role)
    kinds = transcript(agent)
    assert kinds[1] == ("sampled", "<tool_call>") and agent.run.talk.turns[1].stop_reason == "length"
    assert kinds[2][1].startswith("<|im_end|>\n<|im_start|>tool\nError: your <tool_call> block is not closed")
    sampled = agent.run.talk.trajectory(parent=None, status="done").sampled
    start = agent.run.talk.turns[2].start
    assert not sampled[start] and sampled[start - 1]


async def test_a_prompt_that_fills_the_context_ends_the_agent_before_it_begins() -> None:
    agent, _, report = await play(says(), {**SOLVER, "max_context_tokens": 16, "summary": "always"})
    assert agent.run.status == "context_limit" and report.outcome == "model_error"
    assert [kind for kind, _ in transcript(agent)] == ["prompt"]


async def test_long_results_and_reports_are_cut_and_say_so() -> None:
    role = {**SOLVER, "tool_result_limit_characters": 5, "report_limit_characters": 3}
    agent, _, report = await play(says(call("search", query="x"), "abcdef"), role)
    assert "tool\nfound … (cut at 5 characters)<" in transcript(agent)[2][1]
    assert report.text == "abc … (cut at 3 characters)"


async def test_an_engine_failure_is_tried_once_more_from_the_same_tokens() -> None:
    failures = [EngineFailure("gone")]

    async def script(prompt: str, sampling: Sampling) -> Say | str:
        if failures:
            raise failures.pop()
        return "Ann"

    agent, _, report = await play(script)
    assert report == Report("Ann", "ok") and agent.run.status == "done"


async def test_an_engine_that_fails_twice_ends_the_agent_as_engine_failure() -> None:
    async def script(prompt: str, sampling: Sampling) -> Say | str:
        raise EngineFailure("gone")

    agent, _, report = await play(script, {**SOLVER, "summary": "always"})
    assert agent.run.status == "engine_failure" and report.outcome == "infrastructure"


async def test_a_tool_outage_is_told_to_the_model_and_marks_the_trajectory() -> None:
    async def down(arguments: Mapping[str, JsonValue]) -> ToolResult:
        return result("search is down", "infrastructure")

    tools = FakeTools({"search": (down, ("query",))})
    on_stage, _ = stage(settings({"solver": SOLVER}, workflow="single_agent"), says(call("search", query="x"), "Ann"),
                        tools=tools)  # fmt: skip
    scene = Scene(on_stage, task(), "train", group_id="g")
    agent = Agent(scene, "solver", "Who?")
    await agent.play()
    assert "search is down" in transcript(agent)[2][1]
    assert agent.run.status == "tool_failure" and scene.spans[0].outcome == "infrastructure"


async def test_arguments_the_task_fixes_are_hidden_from_the_model_and_sent_to_the_tool() -> None:
    tools = FakeTools({"search": (find, ("query", "collection"))})
    on_stage, _ = stage(
        settings({"solver": {**SOLVER, "system": "{tools}"}}, workflow="single_agent"),
        says(call("search", query="x", collection="mine"), call("search", query="x"), "Ann"),
        tools=tools,
    )
    fixed = task().model_copy(update={"tool_arguments": {"search": {"collection": "world-3"}}})
    agent = Agent(Scene(on_stage, fixed, "train", group_id="g"), "solver", "Who?")
    await agent.play()
    texts = transcript(agent)
    assert "collection" not in texts[0][1] and '"query"' in texts[0][1]
    assert "has no argument 'collection'" in texts[2][1]
    assert tools.seen == [("search", {"query": "x", "collection": "world-3"})]


async def test_evaluation_samples_at_its_own_temperature() -> None:
    config = settings({"solver": {**SOLVER, "sampling": {"temperature": 0.7}}}, workflow="single_agent")
    on_stage, engine = stage(config, says("a", "b"), tools=SEARCH)
    await Agent(Scene(on_stage, task(), "train", group_id="g"), "solver", "Who?").play()
    await Agent(Scene(on_stage, task(), "eval", group_id="g"), "solver", "Who?").play()
    assert [sampling.temperature for sampling in engine.samplings] == [0.7, 0.0]


async def test_xml_calls_are_described_in_the_prompt_and_run() -> None:
    block = (
        "<use_mcp_tool><server_name>search_server</server_name><tool_name>search</tool_name>"
        '<arguments>{"query": "Ann"}</arguments></use_mcp_tool>'
    )
    role = {**SOLVER, "system": "Solve. {tools}"}
    agent, _, _ = await play(says(block, "Ann"), role, call_format="xml")
    assert "## Server name: search_server\n### Tool name: search" in transcript(agent)[0][1]
    assert "found Ann" in transcript(agent)[2][1]


async def test_what_one_turn_reads_is_the_last_message_of_the_prompt() -> None:
    seen: list[str] = []

    async def script(prompt: str, sampling: Sampling) -> Say | str:
        seen.append(last_message(prompt))
        return call("search", query="a") if len(seen) == 1 else "Ann"

    await play(script)
    assert seen == ["Who?", "found a"]


def test_a_single_agent_that_names_delegates_is_refused() -> None:
    roles = {"solver": {**SOLVER, "delegates": ["solver"]}}
    with pytest.raises(ValueError, match="single_agent has nobody to delegate to"):
        settings(roles, workflow="single_agent")


def test_a_role_named_like_a_tool_is_refused() -> None:
    roles: dict[str, dict[str, object]] = {
        "boss": {"system": "", "tools": ["search"], "delegates": ["search"]},
        "search": {"system": ""},
    }
    with pytest.raises(UserError, match="both a tool and a role named 'search'"):
        stage(settings(roles), says(), tools=SEARCH)
