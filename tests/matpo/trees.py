"""Small episode trees with numbers one can work out by hand."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from protocols.records import EpisodeGroup, EpisodeTree, Joint, Replay, Status, Task, Trajectory, Turn, WeightStamp

TASK = Task.make("Where was Ada born?", ("London",))
OTHER = Task.make("Where was Alan born?", ("London",))


def trajectory(
    sampled: str,
    *,
    role: str = "planner",
    parent: tuple[int, int] | None = None,
    status: Status = "done",
    seed: int = 0,
) -> Trajectory:
    """One token per letter of `sampled`: `x` was sampled by version 0 with probability e^-1, `.` was not. Equal letters
    in a row are a turn."""
    flags = np.array([letter == "x" for letter in sampled])
    spans = [(match.start(), match.end()) for match in re.finditer(r"x+|\.+", sampled)]
    chosen = int(flags.sum())
    return Trajectory(
        role=role,
        parent=parent,
        tokens=np.random.default_rng([seed, len(sampled)]).integers(0, 13, len(sampled), dtype=np.int32),
        sampled=flags,
        logprobs=np.full(chosen, -1.0, np.float32),
        versions=np.zeros(chosen, np.int32),
        turns=tuple(Turn(kind="sampled" if flags[at] else "prompt", start=at, stop=stop) for at, stop in spans),
        status=status,
    )


def tree(
    reward: float | None,
    *trajectories: Trajectory,
    name: str = "t0",
    group: str = "g0",
    task: Task = TASK,
    episode: int = 0,
    earned: tuple[float | None, ...] = (),
    joints: tuple[Joint, ...] = (),
    replays: tuple[Replay, ...] = (),
) -> EpisodeTree:
    """A tree of these trajectories (a lone planner with one sampled token if none are given)."""
    return EpisodeTree(
        tree_id=name,
        group_id=group,
        lease_id=f"lease-{group}",
        episode=episode,
        actor_id="actor",
        task=task,
        trajectories=trajectories or (trajectory(".x"),),
        rewards={"total": reward, "answer": reward},
        weights=(WeightStamp(version=0, digest="d"),),
        tool_spans=(),
        started_at=0.0,
        seconds=1.0,
        earned=earned,
        joints=joints,
        replays=replays,
    )


def group(*rewards: float | None) -> EpisodeGroup:
    """One tree per reward."""
    return EpisodeGroup("g0", TASK, tuple(tree(reward, name=f"t{n}") for n, reward in enumerate(rewards)))


def group_of(trees: Sequence[EpisodeTree]) -> EpisodeGroup:
    return EpisodeGroup(trees[0].group_id, trees[0].task, tuple(trees))
