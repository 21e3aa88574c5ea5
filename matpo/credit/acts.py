"""Who acted from which state, and what came of it: a tree read as acts, one trajectory each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Literal

from matpo.credit.baselines import mean
from matpo.credit.scheme import GroupAdvantages
from protocols.records import EpisodeGroup, EpisodeTree

Act = tuple[int, int]
"""(index of the tree in its group, index of the trajectory in its tree)."""
Acts = Mapping[Act, float | None]


def acts(group: EpisodeGroup) -> Iterator[tuple[Act, EpisodeTree]]:
    """Every act of a group and the tree it is in."""
    for number, tree in enumerate(group.trees):
        for index in range(len(tree.trajectories)):
            yield (number, index), tree


def spread(group: EpisodeGroup, scores: Acts) -> GroupAdvantages:
    """Scores in the shape of the group; an act that is not named is not scored."""
    return tuple(
        tuple(scores.get((number, index)) for index in range(len(tree.trajectories)))
        for number, tree in enumerate(group.trees)
    )


def same_for_all(group: EpisodeGroup, scalars: Sequence[float | None]) -> GroupAdvantages:
    """One scalar per tree, given to each of its trajectories; each one's own `sampled` says which tokens it reaches."""
    return tuple((scalar,) * len(tree.trajectories) for scalar, tree in zip(scalars, group.trees, strict=True))


def grouped(group: EpisodeGroup, key: Callable[[Act, EpisodeTree], Hashable | None]) -> tuple[tuple[Act, ...], ...]:
    """Acts with equal keys together, in order of appearance; None leaves an act out."""
    members: dict[Hashable, list[Act]] = defaultdict(list)
    for act, tree in acts(group):
        name = key(act, tree)
        if name is not None:
            members[name].append(act)
    return tuple(map(tuple, members.values()))


def siblings(group: EpisodeGroup) -> tuple[tuple[Act, ...], ...]:
    """Acts of one role from one state. Those that start from the task alone share it over all trees of the group."""
    after = [joint_before(tree) for tree in group.trees]

    def state(act: Act, tree: EpisodeTree) -> Hashable:
        number, index = act
        trajectory, joint = tree.trajectories[index], after[number].get(index)
        if trajectory.parent is None and joint is None:
            return trajectory.role
        return number, trajectory.parent if joint is None else ("after", joint), trajectory.role

    return grouped(group, state)


def joint_before(tree: EpisodeTree) -> dict[int, int]:
    """Of each act that followed a joint action, the index of that joint action."""
    return {member: joint.after for joint in tree.joints if joint.after is not None for member in joint.members}


def own_reward(tree: EpisodeTree, index: int) -> float | None:
    """What an act itself earned; a root that was not scored by itself earned the tree's total."""
    earned = tree.earned[index] if tree.earned else None
    return tree.reward if index == 0 and earned is None else earned


def depth(tree: EpisodeTree, index: int) -> int:
    """How many acts stand above this one."""
    above = 0
    while (parent := tree.trajectories[index].parent) is not None:
        index, above = parent[0], above + 1
    return above


def previous(tree: EpisodeTree, index: int) -> int | None:
    """The same agent's act before this one; None for its first."""
    parent = tree.trajectories[index].parent
    if parent is None or tree.trajectories[parent[0]].role != tree.trajectories[index].role:
        return None
    return parent[0]


def round_of(tree: EpisodeTree, index: int) -> int:
    """0 for an agent's first act, 1 for the next."""
    number, at = 0, previous(tree, index)
    while at is not None:
        number, at = number + 1, previous(tree, at)
    return number


def children(tree: EpisodeTree) -> list[list[int]]:
    """Of each act, those it called or that followed it."""
    below: list[list[int]] = [[] for _ in tree.trajectories]
    for index, trajectory in enumerate(tree.trajectories):
        if trajectory.parent is not None:
            below[trajectory.parent[0]].append(index)
    return below


def returns(tree: EpisodeTree) -> list[float | None]:
    """V of each act: what a leaf earned, and of any other act the mean over those below it (mean back-up)."""
    below = children(tree)
    found: list[float | None] = list(tree.earned) or [None] * len(tree.trajectories)
    for index in reversed(range(len(below))):
        if below[index]:
            found[index] = mean([found[child] for child in below[index]])
    return found


def joint_returns(tree: EpisodeTree, discount: float) -> list[float | None]:
    """R of each joint action: its reward + discount · mean R of those that followed it (0 where none did)."""
    found: list[float | None] = [joint.reward for joint in tree.joints]
    for index in reversed(range(len(found))):
        following = [later for later, joint in enumerate(tree.joints) if joint.after == index]
        own, future = found[index], mean([found[later] for later in following])
        found[index] = own if own is None or not following else None if future is None else own + discount * future
    return found


def through_joints(
    tree: EpisodeTree, values: Sequence[float | None], *, several: Literal["sum", "mean"]
) -> dict[int, float | None]:
    """Of each act that took part in joint actions, their values together; None where one of them is not scored."""
    parts: dict[int, list[float | None]] = defaultdict(list)
    for joint, value in zip(tree.joints, values, strict=True):
        for member in joint.members:
            parts[member].append(value)
    totals: dict[int, float | None] = {}
    for member, shares in parts.items():
        total = sum(share for share in shares if share is not None)
        totals[member] = None if None in shares else total if several == "sum" else total / len(shares)
    return totals
