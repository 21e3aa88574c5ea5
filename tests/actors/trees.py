"""Small trees for tests of what happens to them after they were played."""

from __future__ import annotations

import numpy as np

from protocols.records import EpisodeTree, Task, Trajectory, Turn, WeightStamp


def small_tree(tree_id: str, *, lease_id: str = "lease-1", episode: int = 0) -> EpisodeTree:
    """Five tokens of one planner, two of them sampled by version 3."""
    trajectory = Trajectory(
        role="planner",
        parent=None,
        tokens=np.array([5, 6, 7, 8, 9], dtype=np.int32),
        sampled=np.array([False, False, False, True, True]),
        logprobs=np.array([-0.5, -1.5], dtype=np.float32),
        versions=np.array([3, 3], dtype=np.int32),
        turns=(Turn(kind="prompt", start=0, stop=3), Turn(kind="sampled", start=3, stop=5, stop_reason="stop")),
        status="done",
    )
    return EpisodeTree(
        tree_id=tree_id,
        group_id="group-1",
        lease_id=lease_id,
        episode=episode,
        actor_id="actor-0",
        task=Task.make("who ?", ("me",)),
        trajectories=(trajectory,),
        rewards={"total": 1.0},
        weights=(WeightStamp(version=3, digest="d3"),),
        tool_spans=(),
        started_at=0.0,
        seconds=1.0,
    )
