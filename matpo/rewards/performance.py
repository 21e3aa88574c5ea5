"""What a reward may look at: each agent's words and calls, as text, in the order of the tree's trajectories."""

from __future__ import annotations

from dataclasses import dataclass

from protocols.records import INFRASTRUCTURE, Status, Task, ToolSpan


@dataclass(frozen=True, slots=True)
class Performance:
    """One agent's part in an episode."""

    role: str
    status: Status
    final: str | None
    """Its last message without thinking and tool blocks; None if it never gave one."""
    subtask: str | None
    """What it was asked to do by the agent that called it; None for one that nobody called."""
    results: tuple[str, ...]
    """Texts its tools returned, in the order they arrived."""
    calls: tuple[ToolSpan, ...]
    """Every call it wrote, refused ones included."""
    parent: tuple[int, int] | None = None
    """(agent, turn) that this one was called from or follows."""
    turns: int = 1
    """Messages it wrote."""

    @property
    def broken(self) -> bool:
        """It broke off for reasons that are not the policy's."""
        return self.status in INFRASTRUCTURE


@dataclass(frozen=True, slots=True)
class Play:
    """One finished episode; the root, if there is one, comes first."""

    task: Task
    agents: tuple[Performance, ...]

    @property
    def scorable(self) -> bool:
        """No agent and no call broke off for reasons that are not the policy's."""
        return not any(
            agent.broken or any(call.outcome == "infrastructure" for call in agent.calls) for agent in self.agents
        )
