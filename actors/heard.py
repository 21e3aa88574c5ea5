"""What an episode hears from outside, each answer at its place, so that a replay hears the same up to a decision.

Places are nodes of the tree, not moments: agents that act side by side hear what their counterparts heard.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable, Mapping
from typing import Final, Generic, TypeVar

from actors.engines.engine import Generation
from actors.together import news
from actors.tools.plane import ToolResult
from matpo.rewards.verdict import Verdict

Answer = TypeVar("Answer")
Node = tuple[tuple[int, int], ...]
"""An agent's place in its tree: the turn it hangs at (-1: it starts from the task) and which of those that hang there,
for everybody above it and itself."""
Place = tuple[Hashable, ...]
"""A node and what was asked there."""


class Line(Generic[Answer]):
    """Questions of one kind to the outside and their answers."""

    def __init__(self, recorded: Mapping[Place, Answer] | None, decision: Place | None) -> None:
        """Without `recorded` everything is asked. With it, what was recorded is heard again, until `decision` is asked
        anew; so is everything that comes after that, but not what only happens beside it."""
        self._recorded = recorded
        self._decision = decision
        self.asked: dict[Place, Answer] = {}
        """Answers that came from outside."""

    async def ask(self, place: Place, question: Callable[[], Awaitable[Answer]]) -> Answer:
        """The recorded answer, or else that to the question. Raises `LookupError` for a place the record lacks."""
        if self._recorded is not None and not news.get():
            if place != self._decision:
                if place not in self._recorded:
                    raise LookupError(
                        f"replaying an episode came to {place}, which is not in its record: a workflow must do the same"
                        " where it hears the same, and several things at once by actors.together"
                    )
                return self._recorded[place]
            news.set(True)
        answer = self.asked[place] = await question()
        return answer


class Heard:
    """All that an episode hears."""

    def __init__(self, record: Heard | None = None, decision: Place | None = None) -> None:
        """`record` is a finished episode, to be replayed up to a completion of it, `decision`."""
        self.completions: Line[Generation] = Line(None if record is None else record.completions.asked, decision)
        """At (node, turn)."""
        self.words: Line[str] = Line(None if record is None else record.words.asked, decision)
        """Of roles played elsewhere, at (node, turn)."""
        self.results: Line[ToolResult] = Line(None if record is None else record.results.asked, decision)
        """At (node, turn, number of the call)."""
        self.verdicts: Line[Verdict] = Line(None if record is None else record.verdicts.asked, decision)
        """At the nodes of those who are judged, each with the length of its conversation."""


START: Final[Node] = ()
"""Above everybody."""
