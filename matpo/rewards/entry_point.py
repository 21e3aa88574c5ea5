"""Rewards of a user's own, named `module:function` in the config."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
from collections.abc import Awaitable, Callable
from typing import cast

from matpo.errors import UserError
from matpo.rewards.performance import Play
from protocols.records import Task

Score = float | None
"""None means not scored, never 0."""
AnswerFunction = Callable[[Task, tuple[str, ...]], Score | Awaitable[Score]]
"""A task and the final messages of those who answered (one, or those of a joint answer) → what they are worth."""
WorkerFunction = Callable[[Task, str, str], Score | Awaitable[Score]]
"""A task, a subtask and the report on it → what the worker's act earned."""
PlayFunction = Callable[[Play], Score | Awaitable[Score]]
"""A finished episode → one part of its reward."""


def answer_function(name: str) -> AnswerFunction:
    """The function of `rewards.answer`. Raises `UserError`."""
    return cast(AnswerFunction, _found(name, ("task", "messages")))


def worker_function(name: str) -> WorkerFunction:
    """The function of `rewards.workers`. Raises `UserError`."""
    return cast(WorkerFunction, _found(name, ("task", "subtask", "report")))


def play_function(name: str) -> PlayFunction:
    """The function of a part of the reward. Raises `UserError`."""
    return cast(PlayFunction, _found(name, ("play",)))


async def scored(name: str, result: Score | Awaitable[Score]) -> Score:
    """The number a user's function gave. Raises ValueError for anything else."""
    value = await result if inspect.isawaitable(result) else result
    if value is None:
        return None
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return float(value)
    raise ValueError(f"reward function {name!r} returned {value!r}; a finite number or None is needed")


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
