"""Rewards of a user's own, named `module:function` in the config. Their failures cost a score, never the actor."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
import traceback
from collections.abc import Awaitable, Callable
from typing import Final, Generic, ParamSpec, cast

import structlog

from matpo.errors import UserError
from matpo.rewards.performance import Play
from protocols.records import Task

MOST_FAILURES: Final = 50
"""In a row, without one number between them; then the function never works."""

Score = float | None
"""None means not scored, never 0."""
Arguments = ParamSpec("Arguments")

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class UserFunction(Generic[Arguments]):
    """A function of a user's, at work. Where it fails there is no score; a traceback is logged once for every place."""

    def __init__(self, name: str, function: Callable[Arguments, Score | Awaitable[Score]]) -> None:
        self.name = name
        self.failures = 0
        self._in_a_row = 0
        self._function = function
        self._places: set[str] = set()

    async def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Score:
        """What it says; None where it says so or fails. Raises `UserError` when it fails again and again."""
        try:
            result = self._function(*args, **kwargs)
            score = await result if inspect.isawaitable(result) else result
        except Exception as error:  # noqa: BLE001 - whatever a user's function raises is its failure, not the actor's
            self._fail(f"{type(error).__name__}: {_first_line(error)}", place=_place(error))
            return None
        if score is not None and not (isinstance(score, bool | int | float) and math.isfinite(score)):
            self._fail(f"{score!r} in place of a finite number or None", place=None)
            return None
        self._in_a_row = 0
        return None if score is None else float(score)

    def _fail(self, reason: str, *, place: str | None) -> None:
        self.failures += 1
        self._in_a_row += 1
        if place is not None:
            reason = f"{reason} ({place})"
        new = place is not None and place not in self._places
        log.warning("reward function failed", function=self.name, reason=reason, failures=self.failures, exc_info=new)
        if new and place is not None:
            self._places.add(place)
        if self._in_a_row >= MOST_FAILURES:
            raise UserError(
                f"reward function {self.name!r} failed {self._in_a_row} times in a row, last with {reason}; correct it,"
                " then resume the run"
            )


AnswerFunction = UserFunction[[Task, tuple[str, ...]]]
"""A task and the final messages of those who answered (one, or those of a joint answer) → what they are worth."""
WorkerFunction = UserFunction[[Task, str, str]]
"""A task, a subtask and the report on it → what the worker's act earned."""
LocalFunction = UserFunction[[Task, str, str]]
"""A task, a role and its message → what that answer earned beside those it was given with."""
PlayFunction = UserFunction[[Play]]
"""A finished episode → one part of its reward."""


def answer_function(name: str) -> AnswerFunction:
    """The function of `rewards.answer`. Raises `UserError`."""
    return UserFunction(name, cast(Callable[[Task, tuple[str, ...]], Score], _found(name, ("task", "messages"))))


def worker_function(name: str) -> WorkerFunction:
    """The function of `rewards.workers`. Raises `UserError`."""
    return UserFunction(name, cast(Callable[[Task, str, str], Score], _found(name, ("task", "subtask", "report"))))


def local_function(name: str) -> LocalFunction:
    """The function of `rewards.local`. Raises `UserError`."""
    return UserFunction(name, cast(Callable[[Task, str, str], Score], _found(name, ("task", "role", "message"))))


def play_function(name: str) -> PlayFunction:
    """The function of a part of the reward. Raises `UserError`."""
    return UserFunction(name, cast(Callable[[Play], Score], _found(name, ("play",))))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _place(error: Exception) -> str:
    """Where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{os.path.basename(frame.filename)}, line {frame.lineno}"


def _found(name: str, parameters: tuple[str, ...]) -> object:
    module_name, _, attribute = name.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"reward function {name!r}: {error}; start in the folder of {module_name.partition('.')[0]}.py, or"
            " install it"
        ) from error
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise UserError(
            f"reward function {name!r}: its module fails with {type(error).__name__}: {_first_line(error)}"
            f" ({_place(error)}); correct it"
        ) from error
    function = vars(module).get(attribute)
    if not callable(function):
        raise UserError(f"reward function {name!r}: {module.__file__} has no function {attribute!r}")
    try:
        inspect.signature(function).bind(*parameters)
    except TypeError as error:
        raise UserError(
            f"reward function {name!r} is called with ({', '.join(parameters)}): {error}; see docs/rewards.md"
        ) from error
    return function
