"""SWEET-RL's topology (arXiv 2503.15478): an agent asks a simulated user, who knows more, and then answers."""

from __future__ import annotations

from actors.scene import Scene, fill
from actors.workflows.acting import Act, enter, last_turn, words
from matpo.workflow_config import SimulatedUser
from protocols.records import Task


async def simulated_user(scene: Scene, settings: SimulatedUser) -> float | None:
    """Talk until the agent answers or has had its turns; returns what its last message is worth.

    The user is meant to be frozen: give its role an `endpoint`, or a `learner.role_factors` of 0.
    """
    agent, user = enter(scene, settings.agent, scene.task.question), None
    for turns_left in range(settings.turns - 1, -1, -1):
        await agent.play()
        if not turns_left or agent.run.final is None or settings.answer_mark in agent.run.final:
            break
        user = _listen(scene, settings, agent, user)
        await user.play()
        message = settings.last_message if turns_left == 1 else "{message}"
        agent = agent.again(fill(message, message=words(user)))
    score = (await scene.appraise(agent.run)).score
    scene.earn(agent.index, score)
    return score


def _listen(scene: Scene, settings: SimulatedUser, agent: Act, user: Act | None) -> Act:
    """The user reads what the agent said."""
    if user is not None:
        return user.again(fill(settings.next_user_message, message=words(agent)))
    values = {"question": scene.task.question, "hidden": hidden(scene.task), "message": words(agent)}
    return enter(scene, settings.user, fill(settings.user_message, **values), parent=last_turn(agent))


def hidden(task: Task) -> str:
    """What the user knows and the agent does not."""
    text = task.metadata.get("hidden")
    return text if isinstance(text, str) else task.answers[0]
