"""Episodes of tabular agents, played out in every possible way, as the same records that real agents leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from protocols.records import EpisodeTree, Joint, Replay, Task, Trajectory, Turn, WeightStamp

TASK: Final = Task.make("a game", ())
GROUP: Final = "game"


@dataclass(frozen=True, slots=True, order=True)
class Decision:
    """Something a role decides: its round, and all it knows when it does."""

    role: str
    round: int
    state: str
    actions: int
    """How many there are to choose from."""


Choice = tuple[Decision, int]
"""A decision and the action taken."""


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """One way an episode can go."""

    tree: EpisodeTree
    choices: tuple[Choice, ...]
    """Of each trajectory, one token long."""


class Table:
    """Where one episode is played: every act asks what to do and leaves a trajectory."""

    def __init__(self, script: Sequence[int]) -> None:
        """`script` says the actions of the first acts; those after it take action 0."""
        self._script = script
        self.choices: list[Choice] = []
        self._trajectories: list[Trajectory] = []
        self._earned: dict[int, float] = {}
        self._joints: list[Joint] = []
        self._replays: list[Replay] = []

    def act(self, decision: Decision, *, parent: int | None = None) -> tuple[int, int]:
        """Decide; returns the act's index and the action."""
        index = len(self.choices)
        action = self._script[index] if index < len(self._script) else 0
        self.choices.append((decision, action))
        self._trajectories.append(
            Trajectory(
                role=decision.role,
                parent=None if parent is None else (parent, 1),
                tokens=np.array([0, action], np.int32),
                sampled=np.array([False, True]),
                logprobs=np.zeros(1, np.float32),
                versions=np.zeros(1, np.int32),
                turns=(Turn(kind="prompt", start=0, stop=1), Turn(kind="sampled", start=1, stop=2)),
                status="done",
            )
        )
        return index, action

    def earn(self, act: int, score: float) -> None:
        """What an act was worth by itself."""
        self._earned[act] = score

    def join(self, members: tuple[int, ...], *, after: int | None = None, reward: float | None = None) -> int:
        """Acts that were done at once; returns the index of the joint action."""
        self._joints.append(Joint(members=members, after=after, reward=reward))
        return len(self._joints) - 1

    def replay(self, decision: int, alternative: int, reward: float) -> None:
        """What an alternative to an act led to. The episode's own acts come before all alternatives."""
        self._replays.append(Replay(trajectory=decision, turn=1, alternative=alternative, reward=reward))

    def outcome(self, total: float) -> Outcome:
        """The episode is over."""
        tree = EpisodeTree(
            tree_id="-".join(str(action) for _, action in self.choices),
            group_id=GROUP,
            lease_id=GROUP,
            episode=0,
            actor_id="simulator",
            task=TASK,
            trajectories=tuple(self._trajectories),
            rewards={"total": total},
            weights=(WeightStamp(version=0, digest=""),),
            tool_spans=(),
            started_at=0.0,
            seconds=0.0,
            earned=tuple(self._earned.get(act) for act in range(len(self.choices))) if self._earned else (),
            joints=tuple(self._joints),
            replays=tuple(self._replays),
        )
        return Outcome(tree, tuple(self.choices))


Play = Callable[[Table], float]
"""Plays an episode on a table and returns its reward."""


def every_outcome(play: Play) -> tuple[Outcome, ...]:
    """All ways the game can go, in the order of their actions."""
    found: list[Outcome] = []
    script: list[int] | None = []
    while script is not None:
        table = Table(script)
        found.append(table.outcome(play(table)))
        script = _next([action for _, action in table.choices], [decision.actions for decision, _ in table.choices])
    return tuple(found)


def _next(taken: list[int], sizes: list[int]) -> list[int] | None:
    """The script after the one that was just played to its end: the last act that can still do otherwise does."""
    while taken and taken[-1] == sizes[len(taken) - 1] - 1:
        taken = taken[:-1]
    return [*taken[:-1], taken[-1] + 1] if taken else None
