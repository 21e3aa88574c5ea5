"""One role with tools and nobody to delegate to."""

from __future__ import annotations

from actors.scene import Scene
from actors.workflows.acting import enter


async def single_agent(scene: Scene) -> float | None:
    """The root gets the question and answers it alone. Returns the answer's worth."""
    root = enter(scene, scene.stage.config.episode.root, scene.task.question)
    await root.play()
    return (await scene.appraise(root.run)).score
