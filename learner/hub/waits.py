"""Who waits on whom, since when, and what would help. A wait that passes its limit is a stall, reported once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from protocols.messages import Wait


@dataclass(frozen=True, slots=True)
class Condition:
    """Something that is being waited for at this moment."""

    who: str
    what: str
    limit_s: float
    remedy: str


class WaitBook:
    """Remembers since when each condition has held without a break."""

    def __init__(self) -> None:
        self._since: dict[tuple[str, str], float] = {}
        self._reported: set[tuple[str, str]] = set()

    def update(self, conditions: Iterable[Condition], now_s: float) -> tuple[Wait, ...]:
        """The waits of this moment; conditions not named any more are over."""
        current = {(condition.who, condition.what): condition for condition in conditions}
        self._since = {key: self._since.get(key, now_s) for key in current}
        return tuple(
            Wait(
                who=condition.who,
                what=condition.what,
                since_s=round(now_s - self._since[key], 3),
                limit_s=condition.limit_s,
                remedy=condition.remedy,
            )
            for key, condition in current.items()
        )

    def new_stalls(self, waits: Iterable[Wait]) -> list[Wait]:
        """Of all the waits of this moment, those that passed their limit since they were last asked for here."""
        stalls = {(wait.who, wait.what): wait for wait in waits if wait.since_s > wait.limit_s}
        fresh = [wait for key, wait in stalls.items() if key not in self._reported]
        self._reported = set(stalls)
        return fresh
