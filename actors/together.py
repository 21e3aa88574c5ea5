"""Several things at once, results in order."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import anyio

Result = TypeVar("Result")


async def together(acts: Sequence[Callable[[], Awaitable[Result]]]) -> list[Result]:
    """Call and await all side by side; what each gave, in the order they stand."""
    if len(acts) == 1:
        return [await acts[0]()]
    results: dict[int, Result] = {}

    async def one(number: int, act: Callable[[], Awaitable[Result]]) -> None:
        results[number] = await act()

    async with anyio.create_task_group() as tasks:
        for number, act in enumerate(acts):
            tasks.start_soon(one, number, act)
    return [results[number] for number in range(len(acts))]
