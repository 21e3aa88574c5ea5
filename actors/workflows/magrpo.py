"""MAGRPO's topology (arXiv 2508.04652): agents answer at once, are scored together, hear of it, and answer again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

from actors.scene import Scene, fill
from actors.together import together
from actors.workflows.acting import Act, enter, mean, peers, play
from matpo.rewards.verdict import Verdict
from matpo.workflow_config import Magrpo
from protocols.records import INFRASTRUCTURE, Joint

PASSED, FAILED = "All is well.", "Something is wrong yet."


@dataclass(frozen=True, slots=True, eq=False)
class _Played:
    """A joint answer that others may come after."""

    acts: tuple[Act, ...]
    verdict: Verdict
    joint: int
    """Its index in the tree."""


async def magrpo(scene: Scene, settings: Magrpo) -> float | None:
    """Play a tree of joint answers and return the mean return of the first ones.

    A node is what a joint answer led to (or the task); every agent draws `samples` answers there, which `pairing` makes
    joint answers, each scored on its own. The return of a joint answer is its score and the mean return of those after.
    An evaluation plays one joint answer a turn and returns the score of the last.
    """
    if scene.purpose == "eval":
        settings = settings.model_copy(update={"samples": 1})
    drawn = [[enter(scene, role, scene.task.question) for _ in range(settings.samples)] for role in settings.agents]
    value = await _node(scene, settings, drawn, after=None, turns_left=settings.turns - 1)
    return scene.joints[-1].reward if scene.purpose == "eval" else value


async def _node(
    scene: Scene, settings: Magrpo, drawn: Sequence[Sequence[Act]], *, after: int | None, turns_left: int
) -> float | None:
    """`drawn`: per agent, its samples. Returns the mean return of the node's joint answers, None if none was scored."""
    acts = [act for samples in drawn for act in samples]
    await play(acts)
    if scene.stage.config.rewards.local is not None and scene.purpose == "train":
        await together([partial(_earn, scene, act) for act in acts])
    combined = zip(*drawn, strict=True) if settings.pairing == "aligned" else product(*drawn)
    played = await together([partial(_appraise, scene, acts) for acts in combined])
    numbered = [_joined(scene, acts, verdict, after) for acts, verdict in played]
    scores = {one.joint: one.verdict.score for one in numbered}
    following = _followed(numbered, settings) if turns_left else []
    later = await together([partial(_follow, scene, settings, one, turns_left) for one in following])
    returns = {one.joint: value for one, value in zip(following, later, strict=True)}
    return mean([None if r is None else r + (returns.get(joint) or 0.0) for joint, r in scores.items()])


async def _earn(scene: Scene, act: Act) -> None:
    """Note what an answer is worth by itself."""
    broken = act.run.status in INFRASTRUCTURE
    scene.earn(act.index, None if broken else await scene.stage.score.local(scene.task, act.run.role, act.run.final))


async def _appraise(scene: Scene, acts: tuple[Act, ...]) -> tuple[tuple[Act, ...], Verdict]:
    return acts, await scene.appraise(*(act.run for act in acts))


def _joined(scene: Scene, acts: tuple[Act, ...], verdict: Verdict, after: int | None) -> _Played:
    scene.joints.append(Joint(members=tuple(act.index for act in acts), after=after, reward=verdict.score))
    return _Played(acts, verdict, len(scene.joints) - 1)


def _followed(played: Sequence[_Played], settings: Magrpo) -> list[_Played]:
    """The joint answers that get another turn: none that was not scored, none where the node is good enough."""
    known = [(one, one.verdict.score) for one in played if one.verdict.score is not None]
    if not known or (settings.stop_above is not None and sum(r for _, r in known) / len(known) > settings.stop_above):
        return []
    if settings.follow == "best":
        return [max(known, key=lambda pair: pair[1])[0]]
    return [one for one, _ in known]


async def _follow(scene: Scene, settings: Magrpo, before: _Played, turns_left: int) -> float | None:
    """The node after a joint answer."""
    told = _feedback(before.verdict, settings)
    drawn = []
    for number, act in enumerate(before.acts):
        message = fill(settings.next_message, feedback=told, peers=peers(before.acts, number)).strip()
        drawn.append([act.again(message) for _ in range(settings.samples)])
    return await _node(scene, settings, drawn, after=before.joint, turns_left=turns_left - 1)


def _feedback(verdict: Verdict, settings: Magrpo) -> str:
    match settings.feedback:
        case "full":
            return verdict.feedback
        case "passed":
            return PASSED if verdict.passed else FAILED
        case "none":
            return ""
