"""MALT's topology (arXiv 2412.01928): answers, critiques of each, refined answers to each critique; n³ leaves."""

from __future__ import annotations

from functools import partial

from actors.scene import Scene, fill
from actors.together import together
from actors.workflows.acting import Act, enter, last_turn, majority, mean, play, words
from matpo.workflow_config import GenerateVerifyRefine


async def generate_verify_refine(scene: Scene, settings: GenerateVerifyRefine) -> float | None:
    """Play the whole tree; every refined answer earns its own score. Returns their mean.

    In an evaluation the answer is the majority's.
    """
    answers = [enter(scene, settings.generator, scene.task.question) for _ in range(settings.samples)]
    refined = await together([partial(_generated, scene, settings, answer) for answer in answers])
    leaves = [leaf for branch in refined for leaf in branch]
    verdicts = await together([partial(scene.appraise, leaf.run) for leaf in leaves])
    scores = [verdict.score for verdict in verdicts]
    for leaf, score in zip(leaves, scores, strict=True):
        scene.earn(leaf.index, score)
    return scores[majority(leaves)] if scene.purpose == "eval" else mean(scores)


async def _generated(scene: Scene, settings: GenerateVerifyRefine, answer: Act) -> list[Act]:
    """The leaves below an answer. No branch waits for another."""
    await answer.play()
    message = fill(settings.verify_message, question=scene.task.question, answer=words(answer))
    critiques = [enter(scene, settings.verifier, message, parent=last_turn(answer)) for _ in range(settings.samples)]
    branches = await together([partial(_verified, scene, settings, answer, critique) for critique in critiques])
    return [leaf for branch in branches for leaf in branch]


async def _verified(scene: Scene, settings: GenerateVerifyRefine, answer: Act, critique: Act) -> list[Act]:
    """The leaves below a critique."""
    await critique.play()
    values = {"question": scene.task.question, "answer": words(answer), "critique": words(critique)}
    message = fill(settings.refine_message, **values)
    leaves = [enter(scene, settings.refiner, message, parent=last_turn(critique)) for _ in range(settings.samples)]
    await play(leaves)
    return leaves
