"""Several things at once, results in order."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from typing import Final, TypeVar

import anyio

Result = TypeVar("Result")

news: Final = ContextVar("news", default=False)
"""Whether what is done here comes after something that a replay did not find in its record (`actors.heard`). What runs
beside it does not; what waits for it does, because `together` hands this on."""


async def together(acts: Sequence[Callable[[], Awaitable[Result]]]) -> list[Result]:
    """Call and await all side by side, begun in the order they stand; what each gave, in that order."""
    if len(acts) == 1:
        return [await acts[0]()]
    results: dict[int, Result] = {}
    heard_news: list[bool] = []

    async def one(number: int, act: Callable[[], Awaitable[Result]]) -> None:
        results[number] = await act()
        heard_news.append(news.get())

    async with anyio.create_task_group() as tasks:
        for number, act in enumerate(acts):
            tasks.start_soon(one, number, act)
    if any(heard_news):
        news.set(True)
    return [results[number] for number in range(len(acts))]
