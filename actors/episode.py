"""Plays one episode from a task to its tree: the workflow under a time limit, the reward, and what replays add."""

from __future__ import annotations

import uuid
from contextlib import closing

import anyio
import numpy as np

from actors.replay import Branches, replay
from actors.scene import Run, Scene, Stage
from actors.workflows.played import played
from matpo.rewards.performance import Performance, Play
from protocols.messages import Purpose
from protocols.records import EpisodeTree, Task, ToolSpan


async def play_episode(
    task: Task, *, lease_id: str, group_id: str, episode: int, purpose: Purpose, stage: Stage
) -> EpisodeTree:
    """Play `task` once and return what it left behind, scored.

    Infrastructure trouble (a tool outage, an engine that died, the time limit) is in the statuses and leaves every
    reward None; it raises nothing. Cancelling the call from outside cancels the episode and nothing is returned.
    With `episode.replay`, a scored episode for training is then replayed, each replay under a time limit of its own.
    """
    settings = stage.config.episode
    scene = Scene(stage, task, purpose, group_id=group_id)
    rewards = await _perform(scene)
    if stage.config.rewards.workers != "none":
        play = _play(scene)
        for index, run in enumerate(scene.runs):
            if run.subtask is not None:
                scene.earn(index, await stage.score.earned(play, index))
    branches = Branches(scene)
    if settings.replay is not None and purpose == "train" and rewards["total"] is not None:
        branches = await replay(scene, settings.replay, _total)
    trajectories = tuple(run.talk.trajectory(parent=run.parent, status=run.status) for run in scene.runs)
    trajectories += tuple(branches.trajectories)
    used = sorted({version for trajectory in trajectories for version in np.unique(trajectory.versions).tolist()})
    return EpisodeTree(
        tree_id=uuid.uuid4().hex,
        group_id=group_id,
        lease_id=lease_id,
        episode=episode,
        actor_id=stage.actor_id,
        task=task,
        trajectories=trajectories,
        rewards=rewards,
        weights=stage.stamps(used),
        tool_spans=(*scene.spans, *branches.spans),
        started_at=scene.started_at,
        seconds=scene.elapsed_s,
        earned=scene.earned and (*scene.earned, *[None] * len(branches.trajectories)),
        joints=tuple(scene.joints),
        replays=tuple(branches.replays),
    )


async def _perform(scene: Scene) -> dict[str, float | None]:
    """Play a scene to its end or the time limit, and score it."""
    answer: float | None = None
    with closing(scene), anyio.move_on_after(scene.stage.config.episode.timeout_s):
        answer = await played(scene)
    return await scene.stage.score(_play(scene), answer)


async def _total(scene: Scene) -> float | None:
    return (await _perform(scene))["total"]


def _play(scene: Scene) -> Play:
    agents = (_performance(run, index, scene.spans) for index, run in enumerate(scene.runs))
    return Play(scene.task, tuple(agents))


def _performance(run: Run, index: int, spans: list[ToolSpan]) -> Performance:
    calls = tuple(span for span in spans if span.trajectory == index)
    turns = sum(turn.kind == "sampled" for turn in run.talk.turns)
    return Performance(run.role, run.status, run.final, run.subtask, tuple(run.results), calls, run.parent, turns)
