"""MATPO's topology: a root role delegates subtasks to workers with a fresh context each, to any depth."""

from __future__ import annotations

from dataclasses import dataclass

from actors.agent import Agent, Report
from actors.scene import Scene, fill


async def planner_worker(scene: Scene) -> None:
    """The root gets the question; each delegation starts an agent of the role that was named.

    A worker reads the main question beside its subtask where its role has `recap` on. Delegations of one message run
    side by side.
    """
    root, question = scene.stage.config.episode.root, scene.task.question
    await Agent(scene, root, question, delegate=_Workers(scene)).play()


@dataclass(frozen=True, slots=True, eq=False)
class _Workers:
    """Plays a worker. A function that hands itself on would be a cycle, and keep every episode in memory for long."""

    scene: Scene

    async def __call__(self, role: str, subtask: str, parent: tuple[int, int]) -> Report:
        settings, question = self.scene.stage.config.episode.roles[role], self.scene.task.question
        message = fill(settings.first_message, question=question, subtask=subtask) if settings.recap else subtask
        return await Agent(self.scene, role, message, parent=parent, subtask=subtask, delegate=self).play()
