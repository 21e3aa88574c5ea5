"""What topologies have in common: agents of a role enter, act side by side, and read one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actors.agent import Agent, Report
from actors.outsider import Outsider
from actors.scene import Scene, fill
from actors.together import together
from matpo.rewards.answer import extract_answer, normalise

Act = Agent | Outsider
"""One agent's act; `again` makes its next one."""


def enter(
    scene: Scene, role: str, message: str, *, parent: tuple[int, int] | None = None, subtask: str | None = None
) -> Act:
    """An agent of this role reads its first message."""
    settings = scene.stage.config.episode.roles[role]
    if settings.endpoint is not None:
        return Outsider(scene, role, message, parent=parent, subtask=subtask)
    delegate = Workers(scene) if settings.delegates else None
    return Agent(scene, role, message, parent=parent, subtask=subtask, delegate=delegate)


@dataclass(frozen=True, slots=True, eq=False)
class Workers:
    """Plays a worker. A function that hands itself on would be a cycle, and keep every episode in memory for long."""

    scene: Scene

    async def __call__(self, role: str, subtask: str, parent: tuple[int, int]) -> Report:
        settings, question = self.scene.stage.config.episode.roles[role], self.scene.task.question
        message = fill(settings.first_message, question=question, subtask=subtask) if settings.recap else subtask
        return await enter(self.scene, role, message, parent=parent, subtask=subtask).play()


async def play(acts: Sequence[Act]) -> None:
    """All at once."""
    await together([act.play for act in acts])


def last_turn(act: Act) -> tuple[int, int]:
    """Where an agent that answers this act hangs in the tree."""
    return act.index, len(act.run.talk.turns) - 1


def words(act: Act) -> str:
    """What others read of an act."""
    return act.run.final or "(no answer)"


def peers(acts: Sequence[Act], own: int | None = None) -> str:
    """What an agent reads of the others, by number."""
    return "\n".join(f"[{number}] {words(act)}" for number, act in enumerate(acts, start=1) if number - 1 != own)


def mean(scores: Sequence[float | None]) -> float | None:
    """Of those that are known; None if none is."""
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known else None


def majority(acts: Sequence[Act]) -> int:
    """The first of those with the most common answer; of several such answers, the one given first."""
    answers = [answered(act) for act in acts]
    return answers.index(max(answers, key=answers.count))


def answered(act: Act) -> str:
    """The answer in an act's message, as answers are compared."""
    return normalise(extract_answer(act.run.final or ""))
