"""Several who ask the same at the same time are answered by one call."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import anyio

Answer = TypeVar("Answer")


@dataclass(slots=True)
class _Flight(Generic[Answer]):
    """A call that is under way."""

    landed: anyio.Event = field(default_factory=anyio.Event)
    answer: Answer | None = None
    """None after landing: whoever made the call was cancelled, or it raised."""


class Flights(Generic[Answer]):
    """Calls under way, by what they ask."""

    def __init__(self) -> None:
        self._flights: dict[bytes, _Flight[Answer]] = {}

    async def once(self, key: bytes, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        """The answer of `ask`, which only one of several that ask with the same key at a time makes.

        Where that one is cancelled or raises, the next of those who waited asks.
        """
        while (flight := self._flights.get(key)) is not None:
            await flight.landed.wait()
            if flight.answer is not None:
                return flight.answer
        flight = self._flights[key] = _Flight[Answer]()
        try:
            flight.answer = await ask()
            return flight.answer
        finally:
            del self._flights[key]
            flight.landed.set()
