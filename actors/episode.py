"""Plays one episode from a task to its tree: the workflow under a time limit, then the reward."""

from __future__ import annotations

from actors.scene import Stage
from protocols.messages import Purpose
from protocols.records import EpisodeTree, Task


async def play_episode(
    task: Task, *, lease_id: str, group_id: str, episode: int, purpose: Purpose, stage: Stage
) -> EpisodeTree:
    """Play `task` once and return what it left behind, scored.

    Infrastructure trouble (a tool outage, an engine that died, the time limit) is in the statuses and leaves every
    reward None; it raises nothing. Cancelling the call from outside cancels the episode and nothing is returned.
    """
    raise NotImplementedError
