"""One role with tools and nobody to delegate to."""

from __future__ import annotations

from actors.agent import Agent
from actors.scene import Scene


async def single_agent(scene: Scene) -> None:
    """The root gets the question and answers it alone."""
    await Agent(scene, scene.stage.config.episode.root, scene.task.question).play()
