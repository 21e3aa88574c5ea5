"""MAPoRL's topology (arXiv 2502.18439): agents answer, read one another's answers, and answer again."""

from __future__ import annotations

from functools import partial

from actors.scene import Scene, fill
from actors.together import together
from actors.workflows.acting import answered, enter, majority, mean, peers, play
from matpo.workflow_config import Debate
from protocols.records import Joint


async def debate(scene: Scene, settings: Debate) -> float | None:
    """Play all rounds; every answer of every round earns its own score. Returns the mean of the last round.

    In an evaluation the answer is the majority's.
    """
    acts = [enter(scene, role, scene.task.question) for role in settings.agents]
    for number in range(settings.rounds):
        if number:
            messages = [fill(settings.next_message, peers=peers(acts, own)) for own in range(len(acts))]
            acts = [act.again(message) for act, message in zip(acts, messages, strict=True)]
        await play(acts)
        verdicts = await together([partial(scene.appraise, act.run) for act in acts])
        scores = [verdict.score for verdict in verdicts]
        for act, score in zip(acts, scores, strict=True):
            scene.earn(act.index, score)
        members = tuple(act.index for act in acts)
        scene.joints.append(Joint(members=members, after=number - 1 if number else None, reward=mean(scores)))
        if settings.stop_on_consensus and len(set(map(answered, acts))) == 1:
            break
    return scores[majority(acts)] if scene.purpose == "eval" else mean(scores)
