"""Rewards for generated programs. Nothing of them is parsed or run here: only in the sandbox, through a tool.

A program that ends its process, prints forged results or never ends scores nothing. One that goes to the trouble of
reading the harness out of its own process could still cheat: the tests run beside it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

from pydantic import ValidationError

from matpo.errors import UserError
from matpo.rewards.verdict import UNKNOWN, Verdict
from matpo.rewards_config import SANDBOXED, Rewards
from protocols.records import Index, Record, Task

HELPER: Final = "aux"
"""What the first agent of a collaboration is asked to write."""
COLLABORATION_BEST: Final = 4.0
"""Points."""
_HARNESS: Final = (Path(__file__).parent / "inside" / "harness.py").read_text(encoding="utf-8")
_FENCE: Final = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


class Facts(Record):
    """What the harness reports of a program."""

    parses: bool = False
    helper_returns: bool = False
    """The helper is defined, with a return."""
    main_defined: bool = False
    main_uses_helper: bool = False
    """Main calls the helper,"""
    helper_ignored: bool = False
    """but does nothing with what it returns,"""
    thin: bool = False
    """or does nothing beside."""
    passed: Index = 0
    errors: tuple[str, ...] = ("the program did not come to an end",)
    """Of the first tests that failed, cut."""


class Sandbox(Protocol):
    """Runs a Python program where it can do no harm."""

    async def __call__(self, program: str) -> str | None:
        """What it printed, and how it ended; None if the sandbox itself failed."""
        ...


def program_of(message: str) -> str:
    """The program in a message: its last fenced block, closed or not, else all of it."""
    blocks: list[str] = _FENCE.findall(message)
    return blocks[-1] if blocks else message


async def code_tests(task: Task, messages: Sequence[str], sandbox: Sandbox, *, timeout_s: float) -> Verdict:
    """Share of the task's tests (`metadata["tests"]`, assert statements) that the programs, put together, pass."""
    programs, tests = [program_of(message) for message in messages], tests_of(task)
    found = await _look(programs, tests, sandbox, main="", timeout_s=timeout_s)
    if found is None:
        return UNKNOWN
    score = found.passed / len(tests)
    return Verdict(score, passed=score == 1, feedback=_told(found, tests))


async def collaboration(task: Task, messages: Sequence[str], sandbox: Sandbox, *, timeout_s: float) -> Verdict:
    """MAGRPO's reward for two who write one program (arXiv 2508.04652): `aux` by the first, `metadata["entry_point"]`,
    which may call it, by the last. Share of 4 points:

    0.4 `aux` is defined and returns something · 0.6 the main function is defined, else no more · 0.5 the programs
    together parse, else no more · up to 1 for the share of tests passed · and if any: 0.5 main calls `aux`, 1 more if
    main does something itself, 0.5 less if it ignores what `aux` returns.
    """
    programs, tests = [program_of(message) for message in messages], tests_of(task)
    main = entry_point_of(task)
    found = await _look(programs, tests, sandbox, main=main, timeout_s=timeout_s)
    if found is None:
        return UNKNOWN
    points = 0.4 * found.helper_returns + 0.6 * found.main_defined
    if found.main_defined and found.parses:
        points += 0.5 + found.passed / len(tests)
        if found.passed and found.main_uses_helper:
            points += 0.5 + (not found.thin) - 0.5 * found.helper_ignored
    passed = found.passed == len(tests)
    return Verdict(points / COLLABORATION_BEST, passed=passed, feedback=_told(found, tests, main=main))


def require_tests(tasks: Sequence[Task], rewards: Rewards) -> None:
    """Raise `UserError` where a reward that runs tests has a task without any."""
    if rewards.answer not in SANDBOXED:
        return
    for task in tasks:
        try:
            tests_of(task)
            if rewards.answer == "collaboration":
                entry_point_of(task)
        except ValueError as error:
            raise UserError(f"rewards.answer = {rewards.answer!r}, but {error} ({task.question[:60]!r})") from error


def entry_point_of(task: Task) -> str:
    """The function that a task's tests call. Raises ValueError where it names none."""
    name = task.metadata.get("entry_point")
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"task {task.task_id} has no entry_point in its metadata: the function that its tests call")
    return name


def tests_of(task: Task) -> list[str]:
    """The task's tests. Raises ValueError where it has none."""
    tests = task.metadata.get("tests")
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise ValueError(f"task {task.task_id} has no tests in its metadata: a list of assert statements")
    return [str(test) for test in tests]


async def _look(
    programs: list[str], tests: list[str], sandbox: Sandbox, *, main: str, timeout_s: float
) -> Facts | None:
    """What the harness says of the program; nothing good if it could not say anything, None if nobody could."""
    mark = f"harness-{secrets.token_hex(8)}"
    arguments = (mark, programs, tests, HELPER, main, timeout_s)
    answer = await sandbox(f"{_HARNESS}\n\nmain{arguments!r}\n")
    if answer is None:
        return None
    for line in answer.splitlines():
        if line.startswith(mark):
            try:
                found = Facts.model_validate_json(line.removeprefix(mark))
                return found if found.passed <= len(tests) else Facts()
            except ValidationError:
                break
    return Facts()


def _told(found: Facts, tests: Sequence[str], *, main: str = "") -> str:
    """What the next turn may read."""
    if found.passed == len(tests):
        return f"All {len(tests)} tests passed."
    lines = [f"{found.passed} of {len(tests)} tests passed."]
    if main and not found.helper_returns:
        lines.append(f"There is no function {HELPER!r} that returns something.")
    if main and not found.main_defined:
        lines.append(f"There is no function {main!r}.")
    elif not found.parses:
        lines.append("The program is not valid Python.")
    else:
        lines += found.errors
    if main and found.main_defined and not found.main_uses_helper:
        lines.append(f"{main!r} does not call {HELPER!r}.")
    return "\n".join(lines)
