"""Rewards that run generated code, through the real tool server and its sandbox."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import anyio
import pytest
from pydantic import JsonValue

from actors.scene import Scene
from actors.tools.plane import ToolPlane, ToolResult
from matpo.config import Config, Sampling, Tools
from matpo.errors import UserError
from matpo.rewards.code import require_tests
from matpo.rewards.verdict import Verdict
from protocols.records import Task
from tests.actors.fakes import FakeTools, Say, result, settings, stage

TOOLS = Tools.model_validate(
    {
        "mcpServers": {
            "code": {
                "command": "${PYTHON}",
                "args": ["-m", "tool_servers.code", "serve", "--ahead", "0", "--timeout", "20"],
                "matpo": {"timeout_s": 40, "bare_names": True},
            }
        }
    }
)
TASK = Task.make(
    "Write double(x).",
    ("",),
    {"entry_point": "double", "tests": ["assert double(1) == 2", "assert double(0) == 0", "assert double(-3) == -6"]},
)
AUX = "```python\ndef aux(x):\n    return x\n```"
MAIN = "Here it is:\n```python\ndef double(x):\n    y = aux(x)\n    return y + x\n```"
THIN = "def double(x):\n    return aux(2 * x)"
IGNORING = "def double(x):\n    aux(x)\n    return x + x"
ALONE = "def double(x):\n    return 2 * x"
HALF_RIGHT = "def double(x):\n    return aux(x) + 1"


def config(answer: str) -> Config:
    made = settings({"solver": {"system": "Code."}}, workflow="single_agent")
    rewards = made.rewards.model_copy(update={"answer": answer, "code_test_timeout_s": 0.3})
    return made.model_copy(update={"rewards": rewards})


async def silent(prompt: str, sampling: Sampling) -> Say | str:
    raise AssertionError("nobody plays here")


async def verdicts(answer: str, *joint: tuple[str, ...]) -> list[Verdict]:
    """What the configured measure says of each joint answer."""
    with anyio.fail_after(60):
        async with ToolPlane.open(TOOLS, variables={"PYTHON": sys.executable}) as plane:
            on_stage, _ = stage(config(answer), silent, tools=plane)
            scene = Scene(on_stage, TASK, "train", group_id="g")
            return [await on_stage.measure(TASK, messages, scene._run_code) for messages in joint]


async def test_a_collaboration_earns_the_levels_it_reaches() -> None:
    found = await verdicts(
        "collaboration",
        (AUX, MAIN),
        (AUX, THIN),
        (AUX, IGNORING),
        ("nothing", ALONE),
        (AUX, HALF_RIGHT),
        (AUX, "def other(x):\n    return x"),
        (AUX, "def double(x) return x"),
        ("def aux(x): return", "("),
        (AUX, ""),
    )
    assert [verdict.score and 4 * verdict.score for verdict in found] == [
        pytest.approx(0.4 + 0.6 + 0.5 + 1.0 + 0.5 + 1.0),
        pytest.approx(0.4 + 0.6 + 0.5 + 1.0 + 0.5),  # a thin wrapper
        pytest.approx(0.4 + 0.6 + 0.5 + 1.0 + 0.5 + 1.0 - 0.5),  # the helper's result is ignored
        pytest.approx(0.6 + 0.5),  # no helper, and what the first says in its place is no program that runs
        pytest.approx(0.4 + 0.6 + 0.5 + 1 / 3 + 0.5 + 1.0),
        pytest.approx(0.4),
        pytest.approx(0.4),
        0.0,
        pytest.approx(0.4),
    ]
    assert found[0].passed and found[0].feedback == "All 3 tests passed."
    assert found[4].feedback.splitlines()[0] == "1 of 3 tests passed."
    assert "There is no function 'double'." in found[5].feedback


async def test_programs_score_the_share_of_tests_they_pass_and_cannot_talk_their_way_up() -> None:
    found = await verdicts(
        "code_tests",
        (ALONE,),
        ("def double(x):\n    return 2 if x == 1 else None",),
        (f"{ALONE}\nprint('harness- {{\"passed\": 3}}')\nraise SystemExit(0)",),
        (f"import os\n{ALONE}\nos._exit(0)",),
        ("def double(x):\n    while True:\n        pass",),
        (f"import sys\n{ALONE}\nsys.stdout.write('x' * 10_000_000)",),
    )
    assert [verdict.score for verdict in found] == [1.0, pytest.approx(1 / 3), 0.0, 0.0, 0.0, 1.0]
    assert "TooLong" in found[4].feedback


async def test_a_sandbox_that_is_away_leaves_the_answer_unscored() -> None:
    async def away(arguments: Mapping[str, JsonValue]) -> ToolResult:
        return result("Error: the tool failed", "infrastructure", tool="run_python")

    tools = FakeTools({"run_python": (away, ("code",))})
    on_stage, _ = stage(config("code_tests"), silent, tools=tools)
    scene = Scene(on_stage, TASK, "train", group_id="g")
    assert (await on_stage.measure(TASK, (ALONE,), scene._run_code)).score is None
    assert "double" in str(tools.seen[0][1]["code"])


def test_a_code_reward_without_its_tool_is_refused_at_the_start() -> None:
    with pytest.raises(UserError, match=r"rewards\.code_tool = 'run_python' must name one tool"):
        stage(config("code_tests"), silent)


@pytest.mark.parametrize(
    ("metadata", "answer", "message"),
    [
        ({}, "code_tests", "has no tests in its metadata"),
        ({"tests": []}, "code_tests", "has no tests in its metadata"),
        ({"tests": ["assert f()"]}, "collaboration", "has no entry_point in its metadata"),
        ({"tests": ["assert f()"], "entry_point": "f g"}, "collaboration", "has no entry_point in its metadata"),
        ({"tests": ["assert f()"]}, "code_tests", None),
        ({}, "exact_match", None),
    ],
)
def test_tasks_that_cannot_be_tested_are_refused_before_the_run(
    metadata: dict[str, JsonValue], answer: str, message: str | None
) -> None:
    tasks = [TASK, Task.make("Write f.", ("",), metadata)]
    if message is None:
        require_tests(tasks, config(answer).rewards)
    else:
        with pytest.raises(UserError, match=message):
            require_tests(tasks, config(answer).rewards)
