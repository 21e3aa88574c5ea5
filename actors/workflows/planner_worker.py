"""MATPO's topology: a root role delegates subtasks to workers with a fresh context each, to any depth."""

from __future__ import annotations

from actors.scene import Scene
from actors.workflows.acting import enter


async def planner_worker(scene: Scene) -> float | None:
    """The root gets the question; each delegation starts an agent of the role that was named.

    A worker reads the main question beside its subtask where its role has `recap` on. Delegations of one message run
    side by side. Returns what the root's answer is worth.
    """
    root = enter(scene, scene.stage.config.episode.root, scene.task.question)
    await root.play()
    score = (await scene.appraise(root.run)).score
    if scene.stage.config.rewards.workers != "none":
        scene.earn(root.index, score)
    return score
