"""Plays one episode from a task to its tree: the workflow under a time limit, then the reward."""

from __future__ import annotations

import uuid
from contextlib import closing

import anyio
import numpy as np

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
    """
    settings = stage.config.episode
    answer: float | None = None
    with closing(Scene(stage, task, purpose, group_id=group_id)) as scene, anyio.move_on_after(settings.timeout_s):
        answer = await played(scene)
    trajectories = tuple(run.talk.trajectory(parent=run.parent, status=run.status) for run in scene.runs)
    used = sorted({version for trajectory in trajectories for version in np.unique(trajectory.versions).tolist()})
    play = Play(task, tuple(_performance(run, index, scene.spans) for index, run in enumerate(scene.runs)))
    rewards = await stage.score(play, answer)
    if stage.config.rewards.workers != "none":
        for index, run in enumerate(scene.runs):
            if run.subtask is not None:
                scene.earn(index, await stage.score.earned(play, index))
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
        tool_spans=tuple(scene.spans),
        started_at=scene.started_at,
        seconds=scene.elapsed_s,
        earned=scene.earned,
        joints=tuple(scene.joints),
    )


def _performance(run: Run, index: int, spans: list[ToolSpan]) -> Performance:
    calls = tuple(span for span in spans if span.trajectory == index)
    turns = sum(turn.kind == "sampled" for turn in run.talk.turns)
    return Performance(run.role, run.status, run.final, run.subtask, tuple(run.results), calls, run.parent, turns)
