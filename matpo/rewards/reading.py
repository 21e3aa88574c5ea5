"""Did the workers read, or copy the first search hit? Measurable where a task knows the facts behind its answer."""

from __future__ import annotations

import re

from matpo.rewards.answer import normalise
from matpo.rewards.performance import Performance, Play

_HIT = re.compile(r"^\[(\d+)\]\s*(.+)$", re.MULTILINE)


def fact_reported(play: Play, worker: Performance) -> float | None:
    """1.0 if a worker reports the fact it was asked for, and nothing else, else 0.0; None where it asks for none."""
    wanted = _wanted(play, worker)
    return None if wanted is None else float(normalise(worker.final or "") == wanted)


def reading(play: Play) -> float | None:
    """Share of workers that reported the right fact although the first search hit was another one; None if none could.

    Counts a worker whose subtask holds the first two words (say, `employer Ugo`) of exactly one fact in
    `metadata["chain"]`, whose searches found that fact, and never as their first hit. It is right if its report is that
    fact and nothing else.
    """
    verdicts = [verdict for agent in play.agents[1:] if (verdict := _verdict(play, agent)) is not None]
    return sum(verdicts) / len(verdicts) if verdicts else None


def _wanted(play: Play, agent: Performance) -> str | None:
    """The one fact of the task's chain that an agent was asked for."""
    chain = play.task.metadata.get("chain")
    asked = set((agent.subtask or "").split())
    facts = [fact for fact in chain if isinstance(fact, str)] if isinstance(chain, list) else []
    wanted = [fact for fact in facts if set(fact.split()[:2]) <= asked]
    return normalise(wanted[0]) if len(wanted) == 1 else None


def _verdict(play: Play, agent: Performance) -> bool | None:
    fact = _wanted(play, agent)
    if fact is None:
        return None
    hits = [(int(rank), normalise(text)) for result in agent.results for rank, text in _HIT.findall(result)]
    if fact not in [text for _, text in hits] or (1, fact) in hits:
        return None
    return normalise(agent.final or "") == fact
