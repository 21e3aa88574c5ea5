"""Counterfactual replay (C3, arXiv 2603.06859): a finished episode up to one of its decisions, and on from there.

The workflow runs again and hears what the record says (`actors.heard`) until it comes to the decision; that message and
all that comes after it are drawn anew. What only happens beside it, say the other workers of the same message, stays as
recorded. No recorded token is sampled and no recorded tool call made again.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from actors.conversation import Conversation
from actors.heard import Heard
from actors.scene import Run, Scene
from actors.together import news, together
from matpo.replay_config import Replay as Settings
from matpo.trained_roles import trained
from protocols.records import Replay, Status, ToolSpan, Trajectory

Perform = Callable[[Scene], Awaitable[float | None]]
"""Plays a scene to its end and returns its total reward."""
Moved = dict[tuple[int, int], tuple[int, int]]
"""(agent, turn) of a replay → (trajectory, turn) of the tree, where the turn is new."""


@dataclass(frozen=True, slots=True)
class Decision:
    """A message of an episode: trajectory and sampled turn."""

    index: int
    turn: int


async def replay(scene: Scene, settings: Settings, perform: Perform) -> Branches:
    """Play alternatives at decisions of a finished episode, side by side, and return what came of them.

    The decisions are drawn uniformly from all messages of trained roles, the same ones for the same record. Raises
    `LookupError` or `ValueError` where a workflow does not do the same again.
    """
    decisions = chosen(scene, settings.decisions)
    plays = [decision for decision in decisions for _ in range(settings.alternatives)]
    done = await together([partial(_play_on, scene, decision, perform) for decision in plays])
    branches = Branches(scene)
    for decision, (other, total) in zip(plays, done, strict=True):
        branches.add(decision, other, total)
    return branches


def chosen(scene: Scene, count: int) -> list[Decision]:
    """So many decisions of a finished episode, in the order of the tree."""
    config = scene.stage.config
    roles = trained(config.model.lora, config.learner.role_factors, roles=config.episode.roles, elsewhere=())
    found = [
        Decision(index, number)
        for index, run in enumerate(scene.runs)
        for number, turn in enumerate(run.talk.turns)
        if turn.kind == "sampled" and run.role in roles
    ]
    record = b"".join(run.talk.tokens.tobytes() for run in scene.runs)
    drawn = random.Random(record).sample(found, min(count, len(found)))
    return sorted(drawn, key=lambda decision: (decision.index, decision.turn))


async def _play_on(scene: Scene, decision: Decision, perform: Perform) -> tuple[Scene, float | None]:
    """The episode once more, up to the decision and on from there."""
    news.set(False)
    heard = Heard(scene.heard, (scene.runs[decision.index].node, decision.turn))
    other = Scene(scene.stage, scene.task, scene.purpose, group_id=scene.group_id, heard=heard)
    return other, await perform(other)


class Branches:
    """What replays add to the tree of the episode that they replay."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._own = {run.node: index for index, run in enumerate(scene.runs)}
        self.trajectories: list[Trajectory] = []
        self.spans: list[ToolSpan] = []
        self.replays: list[Replay] = []

    def add(self, decision: Decision, other: Scene, total: float | None) -> None:
        """Take in a replay: its choice as a trajectory of its own, then all that was new after it.

        Raises `ValueError` if it did not go as recorded up to the choice.
        """
        node = self._scene.runs[decision.index].node
        deciding = next((number for number, run in enumerate(other.runs) if run.node == node), None)
        moved: Moved = {}
        said = self._choose(decision, deciding, other, moved)
        for number in range(len(other.runs)):
            if number != deciding:
                self._follow(number, other, said, moved)
        self.replays.append(Replay(trajectory=decision.index, turn=decision.turn, alternative=said[0], reward=total))
        late_s = other.started_at - self._scene.started_at
        for span in other.spans:
            if place := moved.get((span.trajectory, span.turn)):
                told = {"trajectory": place[0], "turn": place[1], "started_s": span.started_s + late_s}
                self.spans.append(span.model_copy(update=told))

    def _choose(self, decision: Decision, deciding: int | None, other: Scene, moved: Moved) -> tuple[int, int]:
        """Keep what was drawn at the decision, nothing but its prompt if that failed, and what the same agent did then.
        Returns the place of the choice."""
        recorded, turn, parent = self._scene.runs[decision.index], decision.turn, (decision.index, decision.turn - 1)
        start = recorded.talk.turns[turn].start
        run = None if deciding is None else other.runs[deciding]
        if deciding is None or run is None or len(run.talk.turns) <= turn:
            talk = Conversation.begin(recorded.role, recorded.talk.tokens[:start])
            return self._keep(talk, parent, "cancelled" if run is None else run.status), 0
        _require_same(run, recorded, start)
        ended = len(run.talk.turns) == turn + 1
        said = self._keep(run.talk.part(turn, turn + 1), parent, run.status if ended else "done"), 1
        moved[deciding, turn] = said
        if not ended:
            rest = self._keep(run.talk.part(turn + 1), said, run.status)
            moved |= {(deciding, later): (rest, later - turn) for later in range(turn + 1, len(run.talk.turns))}
        return said

    def _follow(self, number: int, other: Scene, said: tuple[int, int], moved: Moved) -> None:
        """Keep what another agent said that is new, if it did."""
        run = other.runs[number]
        turns, asked = run.talk.turns, other.heard.completions.asked.keys() | other.heard.words.asked.keys()
        first = next((turn for turn in range(len(turns)) if (run.node, turn) in asked), None)
        if first is None:
            return
        before = [turn for turn in range(first) if turns[turn].kind == "sampled"]
        if before:
            own = self._own[run.node]
            _require_same(run, self._scene.runs[own], turns[before[-1]].stop)
            index = self._keep(run.talk.part(first), (own, before[-1]), run.status)
            moved |= {(number, turn): (index, turn - first + 1) for turn in range(first, len(turns))}
        else:
            index = self._keep(run.talk, self._place(run.parent, other, said, moved), run.status)
            moved |= {(number, turn): (index, turn) for turn in range(len(turns))}

    def _place(
        self, parent: tuple[int, int] | None, other: Scene, said: tuple[int, int], moved: Moved
    ) -> tuple[int, int]:
        """Where a new agent hangs in the tree; one that starts from the task follows the choice."""
        if parent is None:
            return said
        return moved.get(parent) or (self._own[other.runs[parent[0]].node], parent[1])

    def _keep(self, talk: Conversation, parent: tuple[int, int], status: Status) -> int:
        """Its index in the tree."""
        self.trajectories.append(talk.trajectory(parent=parent, status=status))
        return len(self._scene.runs) + len(self.trajectories) - 1


def _require_same(run: Run, recorded: Run, length: int) -> None:
    mine, theirs = run.talk.tokens[:length], recorded.talk.tokens[:length]
    if not np.array_equal(mine, theirs):
        raise ValueError(
            f"replaying an episode, {run.role} did not read and say what it had: workflows must do the same where they"
            " hear the same"
        )
