"""Did the workers read, or copy the first search hit? Measurable where a task knows the facts behind its answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from matpo.rewards.answer import normalise
from matpo.rewards.performance import Performance, Play

_HIT = re.compile(r"^\[(\d+)\]\s*(.+)$", re.MULTILINE)


def reading(play: Play) -> float | None:
    """Share of workers that reported the right fact although the first search hit was another one; None if none could.

    Counts a worker whose subtask holds the first two words (say, `employer Ugo`) of exactly one fact in
    `metadata["chain"]`, whose searches found that fact, and never as their first hit. It is right if its report is that
    fact and nothing else.
    """
    chain = play.task.metadata.get("chain")
    facts = [fact for fact in chain if isinstance(fact, str)] if isinstance(chain, list) else []
    verdicts = [verdict for agent in play.agents[1:] if (verdict := _verdict(agent, facts)) is not None]
    return sum(verdicts) / len(verdicts) if verdicts else None


def _verdict(agent: Performance, facts: Sequence[str]) -> bool | None:
    asked = set((agent.subtask or "").split())
    wanted = [fact for fact in facts if set(fact.split()[:2]) <= asked]
    if len(wanted) != 1:
        return None
    fact = normalise(wanted[0])
    hits = [(int(rank), normalise(text)) for result in agent.results for rank, text in _HIT.findall(result)]
    if fact not in [text for _, text in hits] or (1, fact) in hits:
        return None
    return normalise(agent.final or "") == fact
