"""What a step's episodes say about each role before anything is trained on them. Pure functions of records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from matpo.freshness import distance
from protocols.records import EpisodeGroup, EpisodeTree, Record, Trajectory


class RolePlay(Record):
    """One role's trajectories in the episodes of a step."""

    trajectories: int
    truncated: float
    """Share of them cut short by a limit on tokens, context or turns."""
    staleness_mean: float
    """Optimizer steps between the weights about to be trained and those that sampled a token; mean over tokens."""
    staleness_max: int
    free_riding: float | None
    """Of the trees that can be compared with one of the same task in which the role reported something else (or was
    not called): the share whose reward was the same as in all of those. None for the root role, and where no two trees
    of a task differ."""
    reward_explained: float | None
    """How far the role's report tells the reward of its tree, among the trees of a task: Kelley's ε² = 1 − (variance
    within equal reports) / (variance within tasks), unbiased both; about 0 for a role that does not matter, 1 where the
    report decides. None where no two trees of a task have the same report, or rewards do not vary."""


def role_plays(groups: Sequence[EpisodeGroup], *, current: int) -> dict[str, RolePlay]:
    """Figures of every role that played; `current` is the version about to be trained."""
    trees = [tree for group in groups for tree in group.trees]
    roles = sorted({trajectory.role for tree in trees for trajectory in tree.trajectories})
    roots = {tree.trajectories[0].role for tree in trees}
    return {role: _role_play(groups, role, current=current, is_root=role in roots) for role in roles}


def _role_play(groups: Sequence[EpisodeGroup], role: str, *, current: int, is_root: bool) -> RolePlay:
    played = [t for group in groups for tree in group.trees for t in tree.trajectories if t.role == role]
    versions, counts = np.unique(np.concatenate([t.versions for t in played]), return_counts=True)
    ages = [distance(version=int(version), current=current) for version in versions]
    return RolePlay(
        trajectories=len(played),
        truncated=sum(map(cut_short, played)) / len(played),
        staleness_mean=float(np.average(ages, weights=counts)) if ages else 0.0,
        staleness_max=max(ages, default=0),
        free_riding=None if is_root else free_riding(groups, role),
        reward_explained=None if is_root else reward_explained(groups, role),
    )


def cut_short(trajectory: Trajectory) -> bool:
    """Whether a limit ended the trajectory or its last sampled turn."""
    sampled = [turn for turn in trajectory.turns if turn.kind == "sampled"]
    return trajectory.status in ("turn_limit", "context_limit") or (
        bool(sampled) and sampled[-1].stop_reason in ("length", "context")
    )


def free_riding(groups: Sequence[EpisodeGroup], role: str) -> float | None:
    """See `RolePlay.free_riding`."""
    same = []
    for reports, rewards in _scored(groups, role):
        for report, reward in zip(reports, rewards, strict=True):
            others = [other for key, other in zip(reports, rewards, strict=True) if key != report]
            if others:
                same.append(all(other == reward for other in others))
    return sum(same) / len(same) if same else None


def reward_explained(groups: Sequence[EpisodeGroup], role: str) -> float | None:
    """See `RolePlay.reward_explained` (Kelley 1935)."""
    within, within_freedom, total, total_freedom = 0.0, 0, 0.0, 0
    for reports, rewards in _scored(groups, role):
        alike: dict[Report, list[float]] = {}
        for report, reward in zip(reports, rewards, strict=True):
            alike.setdefault(report, []).append(reward)
        within += sum(_squares(values) for values in alike.values())
        within_freedom += len(rewards) - len(alike)
        total += _squares(rewards)
        total_freedom += len(rewards) - 1
    if not within_freedom or not total:
        return None
    return 1 - (within / within_freedom) / (total / total_freedom)


Report = tuple[bytes, ...]


def _scored(groups: Sequence[EpisodeGroup], role: str) -> Iterator[tuple[list[Report], list[float]]]:
    """Per group, what the role reported in every scored tree, and the tree's reward."""
    for group in groups:
        scored = [(_reported(tree, role), tree.reward) for tree in group.trees if tree.reward is not None]
        if scored:
            yield [report for report, _ in scored], [reward for _, reward in scored]


def _reported(tree: EpisodeTree, role: str) -> Report:
    """The last sampled turn of each of the role's trajectories, in order; empty if it was not called."""
    reports = []
    for trajectory in tree.played:
        if trajectory.role == role:
            spans = [turn for turn in trajectory.turns if turn.kind == "sampled"]
            reports.append(trajectory.tokens[spans[-1].start : spans[-1].stop].tobytes() if spans else b"")
    return tuple(reports)


def _squares(values: Sequence[float]) -> float:
    """Sum of squared differences from the mean."""
    return float(np.square(np.array(values) - np.mean(values)).sum())
