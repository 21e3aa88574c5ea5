"""The tool plane against real processes: what a server does must cost its own call, and no more."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import anyio
import pytest
import structlog.testing
from pydantic import JsonValue

from actors.tools.plane import Starts, ToolPlane, ToolResult
from matpo.config import Tools
from matpo.errors import UserError
from tests.actors.tools.hosts import FREEZE, HOSTILE, VARIABLES, call, entry, hostile, once


async def test_a_call_gives_text_outcome_and_size_and_is_counted() -> None:
    async with hostile() as plane:
        result = await call(plane, "echo", "grüß")
        assert (result.text, result.outcome, result.server, result.tool) == ("grüß", "ok", "hostile", "echo")
        assert result.result_bytes == 6
        (counted,) = [figures for figures in plane.figures("a").tools if figures.calls]
        assert (counted.tool, counted.calls, counted.result_bytes) == ("hostile__echo", 1, 6)


async def test_the_models_own_mistakes_are_told_to_it_and_are_not_infrastructure() -> None:
    async with hostile(allow=["echo", "refuse", "tool_error"]) as plane:
        for result, words in (
            (await plane.call("echo", {"txt": "x"}), "'text' is a required property"),
            (await plane.call("echo", {"text": 5}), "5 is not of type 'string'"),
            (await plane.call("nothing", {}), "there is no tool 'nothing'. Available: echo, refuse, tool_error"),
            (await call(plane, "refuse"), "text must rhyme"),
            (await call(plane, "tool_error"), "no such page"),
        ):
            assert result.outcome == "model_error"
            assert words in result.text


async def test_fixed_arguments_win_and_are_hidden_from_the_model() -> None:
    async with hostile(allow=["echo"]) as plane:
        assert (await plane.episode().call("echo", {"text": "mine"}, fixed={"text": "fixed"})).text == "fixed"
        (shown,) = plane.specs(["echo"], hidden=frozenset({"text"}))
        assert shown.parameters == {"type": "object", "properties": {}, "required": []}
        (whole,) = plane.specs(["hostile__*"])
        assert whole.parameters["required"] == ["text"]


async def test_a_role_that_names_a_tool_nobody_has_is_a_users_error() -> None:
    async with hostile(allow=["echo"]) as plane:
        with pytest.raises(UserError, match="no tool matches 'serach'; the configured servers have: echo"):
            plane.specs(["serach"])


async def test_a_server_that_is_killed_while_it_starts_is_started_again(tmp_path: Path) -> None:
    tools = Tools.model_validate({"mcpServers": {"hostile": once(tmp_path, "kill -9 $$", allow=["echo"])}})
    with anyio.fail_after(30):
        async with ToolPlane.open(tools, variables=VARIABLES) as plane:
            assert (await call(plane, "echo")).text == "hello"


async def test_a_server_that_freezes_at_its_first_start_is_named_killed_and_started_again(tmp_path: Path) -> None:
    frozen = once(tmp_path, f"echo $$ > {tmp_path}/pid; {FREEZE}", allow=["pid"], start_timeout_s=3)
    looks: list[Starts] = []
    with structlog.testing.capture_logs() as logs, anyio.fail_after(60):
        tools = Tools.model_validate({"mcpServers": {"hostile": frozen}})
        async with ToolPlane.open(tools, variables=VARIABLES, watch=looks.append) as plane:
            assert (await call(plane, "pid")).outcome == "ok"
            assert list(looks[0]()) == []
    assert (logs[0]["server"], logs[0]["reason"]) == ("hostile", "no answer within 3 s")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


async def test_a_first_start_under_way_can_be_seen(tmp_path: Path) -> None:
    looks: list[Starts] = []
    tools = Tools.model_validate({"mcpServers": {"hostile": entry("--slow-start", "60", start_timeout_s=0.2)}})
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:

            async def look() -> None:
                await anyio.wait_all_tasks_blocked()
                ((server, since_s),) = looks[0]()
                assert server == "hostile" and since_s > 0

            tasks.start_soon(look)
            with pytest.raises(UserError, match=r"no answer within 0\.2 s, 3 starts in a row"):
                async with ToolPlane.open(tools, variables=VARIABLES, watch=looks.append):
                    pass


async def test_a_crash_fails_the_calls_in_flight_and_the_next_one_finds_the_server_again() -> None:
    async with hostile() as plane:
        async with anyio.create_task_group() as tasks:
            results: list[ToolResult] = []

            async def waiting() -> None:
                results.append(await call(plane, "hang"))

            for _ in range(5):
                tasks.start_soon(waiting)
            await anyio.wait_all_tasks_blocked()
            crashed = await call(plane, "crash")
        assert {result.outcome for result in [crashed, *results]} == {"infrastructure"}
        assert "ended during the call" in crashed.text
        assert (await call(plane, "echo")).text == "hello"


async def test_only_idempotent_tools_are_called_again(tmp_path: Path) -> None:
    async with hostile("--marker", str(tmp_path / "crashed"), idempotent=["crash_once"]) as plane:
        assert (await call(plane, "crash_once", "again")).text == "again"
        assert (await call(plane, "crash")).outcome == "infrastructure"


async def test_a_stopped_server_costs_each_call_its_deadline_and_is_then_replaced() -> None:
    async with hostile(timeout_s=0.4) as plane:
        first = (await call(plane, "pid")).text
        os.kill(int(first), signal.SIGSTOP)
        results: list[ToolResult] = []
        async with anyio.create_task_group() as tasks:

            async def stuck() -> None:
                # 2 KB each, so that the pipe fills up and writes would block as well.
                results.append(await call(plane, "echo", "x" * 2_000))

            for _ in range(64):
                tasks.start_soon(stuck)
        assert {result.outcome for result in results} == {"infrastructure"}
        assert max(result.seconds for result in results) < 2
        with anyio.fail_after(10):
            while (second := await call(plane, "pid")).outcome != "ok":
                pass
        assert second.text != first


async def test_a_tool_that_never_answers_fails_at_its_deadline_alone() -> None:
    async with hostile(timeout_s=0.3) as plane:
        result = await call(plane, "hang")
        assert (result.outcome, "within 0.3 s" in result.text) == ("infrastructure", True)
        assert (await call(plane, "echo")).text == "hello"


@pytest.mark.parametrize("flood", ["flood", "flood_id_last"])
async def test_a_flood_fails_its_own_call_and_nothing_else(flood: str) -> None:
    async with hostile(max_result_bytes=1_000) as plane:
        result = await call(plane, flood)
        assert (result.outcome, "larger than" in result.text) == ("infrastructure", True)
        assert (await call(plane, "echo")).text == "hello"


async def test_a_long_result_is_cut_and_says_so() -> None:
    async with hostile(max_result_bytes=10) as plane:
        assert (await call(plane, "echo", "0123456789abc")).text == "0123456789\n[cut: 13 bytes, 10 shown]"


async def test_junk_lines_and_invalid_utf8_are_survived() -> None:
    async with hostile() as plane:
        assert (await call(plane, "junk")).text == "hello"
        assert (await call(plane, "bad_utf8")).text == "a�b"


async def test_a_result_that_breaks_the_protocol_is_infrastructure() -> None:
    async with hostile() as plane:
        assert (await call(plane, "lie")).outcome == "infrastructure"
        assert (await call(plane, "picture")).text.splitlines()[1] == "[image: image/png, 5 bytes]"


DEEP = '{"a": ' * 900 + "1" + "}" * 900
ODD = [
    '{"jsonrpc": "2.0", "method": "notifications/message", "params": DEEP}',
    '{"jsonrpc": "2.0", "method": "notifications/tools/list_changed", "params": {"_meta": DEEP}}',
    '{"jsonrpc": "2.0", "method": "notifications/progress", "params": {"progressToken": [], "progress": "x"}}',
    '{"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": {"a": 1}}}',
    '{"jsonrpc": "2.0", "method": "notifications/cancelled", "params": [1]}',
    '{"jsonrpc": "2.0", "id": 7, "method": "sampling/createMessage", "params": DEEP}',
    '{"jsonrpc": "2.0", "id": 7, "method": "elicitation/create", "params": {}}',
    '{"jsonrpc": "2.0", "id": "x", "method": "roots/list"}',
    '{"jsonrpc": "2.0", "id": null, "method": "ping"}',
    '{"jsonrpc": "2.0", "id": 1000000000000000000000000000000, "result": {}}',
    '{"jsonrpc": "2.0", "id": 1.5, "result": {}}',
    '{"jsonrpc": "2.0", "id": true, "result": {}}',
    '{"jsonrpc": "2.0", "id": {"a": 1}, "result": {}}',
    '{"jsonrpc": "2.0", "id": 1, "error": {}}',
    '{"jsonrpc": "2.0", "id": 1, "error": {"code": "x", "message": DEEP}}',
    '{"jsonrpc": "2.0", "id": 1, "result": 5}',
    '{"jsonrpc": "1.0", "method": 5}',
    DEEP,
    "[" * 5_000 + "]" * 5_000,
]


@pytest.mark.parametrize("generation", ["--strict", "--modern"])
async def test_no_message_a_server_makes_up_costs_more_than_a_call(generation: str) -> None:
    async with hostile(generation) as plane:
        for line in ODD:
            said = await call(plane, "say", line.replace("DEEP", DEEP))
            assert said.outcome in ("ok", "infrastructure")
            assert (await call(plane, "echo", "on")).text == "on", line
        assert (await call(plane, "deep")).outcome == "infrastructure"
        assert (await call(plane, "echo", "on")).text == "on"


async def test_one_bad_schema_drops_that_tool_and_not_the_server() -> None:
    async with hostile("--bad-schema", deny=["crash"]) as plane:
        names = [spec.name for spec in plane.specs(["*"])]
        assert names == sorted(names)
        assert "echo" in names
        assert not {"bad", "worse", "huge", "deepest", "crash"} & set(names)


@pytest.mark.parametrize("generation", ["--strict", "--modern"])
async def test_servers_that_know_only_the_old_or_only_the_new_protocol_both_work(generation: str) -> None:
    async with hostile(generation) as plane:
        assert (await call(plane, "echo")).text == "hello"
        assert (await call(plane, "refuse")).outcome == "model_error"


async def test_a_pin_that_fits_is_quiet_and_one_that_does_not_names_the_new_one() -> None:
    with pytest.raises(UserError, match=r"'hostile' offers other tools than those pinned .*set matpo.pin = ") as caught:
        async with hostile(pin="0" * 16):
            pass
    new = str(caught.value)[-17:-1]
    async with hostile(pin=new) as plane:
        assert (await call(plane, "echo")).outcome == "ok"
    with pytest.raises(UserError, match="other tools than those pinned"):
        async with hostile(pin=new, deny=["crash"]):
            pass


async def test_new_tools_of_a_running_server_are_noticed_and_change_no_prompt() -> None:
    with structlog.testing.capture_logs() as logs:
        async with hostile(allow=["grow", "grown_*", "echo"], deny=["crash"]) as plane:
            before = plane.specs(["*"])
            assert (await call(plane, "grow")).outcome == "ok"
            while not logs:
                await call(plane, "echo")
            assert plane.specs(["*"]) == before
    assert (logs[0]["event"], logs[0]["added"]) == (
        "tool server changed its tools; prompts keep the old ones",
        ["grown_0"],
    )


async def test_a_pinned_server_whose_tools_change_while_it_runs_answers_no_more_calls() -> None:
    offered: list[str] = []
    with pytest.raises(UserError, match="pinned") as caught:
        async with hostile(pin="0" * 16):
            pass
    async with hostile(pin=str(caught.value)[-17:-1], timeout_s=5) as plane:
        await call(plane, "grow")
        while (result := await call(plane, "echo")).outcome == "ok":
            offered.append(result.text)
        assert "offers other tools than those pinned" in result.text or "ended during the call" in result.text


@pytest.mark.parametrize("key", ["allow", "deny", "idempotent", "rename"])
async def test_extras_about_a_tool_that_does_not_exist_are_a_users_error(key: str) -> None:
    given: JsonValue = {"ecko": "x"} if key == "rename" else ["ecko"]
    with pytest.raises(UserError, match=rf"'hostile' has no tool 'ecko' \(matpo.{key}\); it has: bad_utf8, crash, "):
        tools = Tools.model_validate({"mcpServers": {"hostile": entry(**{key: given})}})
        async with ToolPlane.open(tools, variables=VARIABLES):
            pass


@pytest.mark.parametrize("odd", ["\ud800", 10**30])
async def test_arguments_that_no_json_can_carry_are_the_models_fault(odd: JsonValue) -> None:
    async with hostile() as plane:
        result = await plane.call("echo", {"text": "x", "odd": odd})
        assert (result.outcome, "cannot be sent" in result.text) == ("model_error", True)


async def test_no_more_calls_than_max_inflight_reach_a_server_at_once() -> None:
    async with hostile(max_inflight=3) as plane:
        peaks: list[int] = []
        async with anyio.create_task_group() as tasks:

            async def one() -> None:
                peaks.append(int((await call(plane, "peak")).text))

            for _ in range(20):
                tasks.start_soon(one)
        assert max(peaks) == 3


async def test_a_server_gets_no_secrets_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    async with hostile() as plane:
        assert "SECRET_TOKEN" not in (await call(plane, "environment")).text


async def test_a_server_that_cannot_come_back_fails_calls_at_once_with_the_reason(tmp_path: Path) -> None:
    async with hostile("--only-once", str(tmp_path / "started"), timeout_s=20) as plane:
        assert (await call(plane, "crash")).outcome == "infrastructure"
        down = await call(plane, "echo")
        assert down.outcome == "infrastructure"
        assert "server 'hostile' is down" in down.text


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"command": "${PYTHON}", "args": [HOSTILE, "--die", "no database here"]}, "no database here"),
        ({"command": "/no/such/program"}, "no program '/no/such/program'; install it or give its full path"),
        ({"command": "${PYTHON}", "cwd": "/no/such/folder"}, "its cwd '/no/such/folder' is no folder"),
        (
            {"command": "${PYTHON}", "args": [HOSTILE, "--slow-start", "60"], "matpo": {"start_timeout_s": 0.5}},
            "no answer within 0.5 s",
        ),
        ({"url": "http://127.0.0.1:9/mcp"}, "at http://127.0.0.1:9/mcp cannot be used: ConnectError"),
    ],
)
async def test_a_server_that_does_not_start_is_a_users_error_with_its_last_words(
    entry: Mapping[str, JsonValue], words: str
) -> None:
    tools = Tools.model_validate({"mcpServers": {"broken": entry}})
    with anyio.fail_after(20), pytest.raises(UserError, match="tool server 'broken'") as caught:
        async with ToolPlane.open(tools, variables={"PYTHON": sys.executable}):
            pass
    assert words in str(caught.value)


async def test_an_exception_of_the_block_leaves_the_plane_as_it_is() -> None:
    with pytest.raises(LookupError, match="mine"):
        async with hostile():
            raise LookupError("mine")


async def test_idempotent_calls_survive_a_server_that_is_killed_again_and_again() -> None:
    async with hostile(idempotent=["echo", "pid"], retries=8, timeout_s=10) as plane:
        results: list[ToolResult] = []

        async def episode() -> None:
            for _ in range(6):
                results.append(await call(plane, "echo"))

        async with anyio.create_task_group() as tasks:
            for _ in range(100):
                tasks.start_soon(episode)
            for _ in range(3):
                os.kill(int((await call(plane, "pid")).text), signal.SIGKILL)
        assert [result.outcome for result in results] == ["ok"] * 600
