"""What an episode costs: how long its longest chain of turns is, and how many agents were called."""

from __future__ import annotations

from collections import defaultdict

from matpo.rewards.performance import Play


def critical_steps(play: Play) -> int:
    """Turns on the critical path: Σ over stages of the caller's turns and of the longest of those it called at once.

    Agents called from the same turn run side by side, so only the longest of them counts (Kimi K2.5's "critical
    steps"); the same holds for agents that start, or follow another, together.
    """
    longest: dict[tuple[int, int] | None, int] = defaultdict(int)
    below: dict[int, int] = defaultdict(int)
    for index in range(len(play.agents) - 1, -1, -1):  # children before their parents
        agent = play.agents[index]
        length = agent.turns + below[index]
        if length > longest[agent.parent]:
            if agent.parent is not None:
                below[agent.parent[0]] += length - longest[agent.parent]
            longest[agent.parent] = length
    return longest[None]


def spawned(play: Play) -> int:
    """Agents that another agent called."""
    return sum(agent.subtask is not None for agent in play.agents)
