"""Several things at once, and the same thing asked by several."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import anyio
import pytest

from actors.flights import Flights
from actors.together import news, together


async def test_results_stand_in_the_order_of_the_acts_whoever_ends_first() -> None:
    second = anyio.Event()

    async def act(number: int) -> int:
        if number == 0:
            await second.wait()
        second.set()
        return number

    with anyio.fail_after(5):
        assert await together([partial(act, 0), partial(act, 1)]) == [0, 1]
    assert await together([]) == []


async def test_who_waits_for_others_has_heard_their_news_and_who_acts_beside_them_has_not() -> None:
    heard, beside = anyio.Event(), list[bool]()

    async def hear() -> None:
        news.set(True)
        heard.set()

    async def ignore() -> None:
        await heard.wait()
        beside.append(news.get())

    with anyio.fail_after(5):
        inner: list[Callable[[], Awaitable[None]]] = [hear, ignore]
        outer: list[Callable[[], Awaitable[object]]] = [partial(together, inner), ignore]
        await together(outer)
    assert news.get() and beside == [False, False]


async def test_those_who_ask_the_same_at_the_same_time_share_one_answer() -> None:
    flights, asked, gate = Flights[str](), list[bytes](), anyio.Event()

    async def ask(key: bytes) -> str:
        asked.append(key)
        await gate.wait()
        return key.decode()

    async def open_gate() -> str:
        while len(asked) < 2:
            await anyio.lowlevel.checkpoint()
        gate.set()
        return "open"

    keys = (b"a", b"a", b"b", b"a")

    async def once(key: bytes) -> str:
        return await flights.once(key, partial(ask, key))

    with anyio.fail_after(5):
        asks: list[Callable[[], Awaitable[str]]] = [open_gate, *(partial(once, key) for key in keys)]
        answers = await together(asks)
    assert answers == ["open", "a", "a", "b", "a"]
    assert sorted(asked) == [b"a", b"b"]


async def test_where_the_one_who_asks_fails_the_next_who_waited_asks() -> None:
    flights, gate = Flights[str](), anyio.Event()
    waiting = anyio.Event()

    async def fail() -> str:
        await gate.wait()
        raise LookupError("gone")

    async def first() -> str:
        with pytest.raises(LookupError, match="gone"):
            await flights.once(b"k", fail)
        return "failed"

    async def second() -> str:
        waiting.set()
        return await flights.once(b"k", answer)

    async def answer() -> str:
        return "there"

    async def open_gate() -> str:
        await waiting.wait()
        gate.set()
        return "open"

    with anyio.fail_after(5):
        assert await together([first, second, open_gate]) == ["failed", "there", "open"]
