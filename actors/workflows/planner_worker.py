"""MATPO's topology: a root role delegates subtasks to workers with a fresh context each, to any depth."""

from __future__ import annotations

from actors.agent import Agent, Report
from actors.scene import Scene, fill


async def planner_worker(scene: Scene) -> None:
    """The root gets the question; each delegation starts an agent of the role that was named.

    A worker reads the main question beside its subtask where its role has `recap` on. Delegations of one message run
    side by side.
    """
    episode, question = scene.stage.config.episode, scene.task.question

    async def delegate(role: str, subtask: str, parent: tuple[int, int]) -> Report:
        settings = episode.roles[role]
        message = fill(settings.first_message, question=question, subtask=subtask) if settings.recap else subtask
        return await Agent(scene, role, message, parent=parent, subtask=subtask, delegate=delegate).play()

    await Agent(scene, episode.root, question, delegate=delegate).play()
