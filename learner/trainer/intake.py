"""From the hub's frames to what a step trains on: trees, groups, credit, weights, micro-batches. Nothing is random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from learner.trainer.costs import ModelShape
from learner.trainer.pack import MicroBatch, pack
from learner.trainer.plan import Sample
from learner.trainer.ranks import ALONE, Ranks
from matpo.config import Config, Learner
from matpo.credit.acts import spread
from matpo.credit.scheme import NOTHING, GroupAdvantages, Memory, TreeAdvantages
from matpo.diagnostics import RolePlay, role_plays
from matpo.freshness import distance
from matpo.weighting import TreeWeights, token_weights
from protocols.codec import decode_tree
from protocols.messages import Batch
from protocols.records import EpisodeGroup, EpisodeTree, Record

UNSCORED = "unscored"
NO_TOKENS = "nothing_to_train"
UNKNOWN_ROLE = "unknown_role"
UNKNOWN_TOKEN = "token_outside_vocabulary"
SAMPLED_FIRST = "first_token_sampled"
ZERO_VARIANCE = "zero_variance"
FLAT = 1e-9
"""Largest advantage that is taken for 0: rewards that are equal but for rounding."""


class IntakeReport(Record):
    """What a batch held, before training on it."""

    groups: int
    trees: int
    filtered_trees: int
    """Left out by the trainer: not scored, or nothing in them the policy could learn from."""
    trajectories: int
    """That weigh something in the loss."""
    reward_mean: float
    """Over scored trees; 0 without one."""
    reward_parts: dict[str, float]
    """Mean of each part of the reward over the trees where it was scored."""
    all_fail_groups: float
    """Fraction of groups in which no answer scored."""
    all_pass_groups: float
    """Fraction of groups in which every answer scored fully."""
    zero_variance_groups: int
    """In which every advantage is 0."""
    staleness_mean: float
    """Optimizer steps between the weights about to be trained and the oldest that sampled the tree."""
    staleness_max: int
    role_plays: dict[str, RolePlay]
    """Of every role that played, in trees that were not filtered as defective."""


@dataclass(frozen=True, slots=True, eq=False)
class StepInput:
    """Everything one step needs."""

    micro_batches: tuple[MicroBatch, ...]
    """Of the rank that asked."""
    samples: tuple[Sample, ...]
    """Of all ranks."""
    trained: tuple[str, ...]
    """Ids of the trees in the loss."""
    filtered: tuple[tuple[str, str], ...]
    """(tree id, reason) of the others."""
    memory: Memory
    """What the credit scheme carries on to the next step."""
    report: IntakeReport


def read_trees(batch: Batch, frames: Sequence[memoryview | bytes]) -> tuple[EpisodeTree, ...]:
    """Decode a batch. Raises `MalformedTree` (the hub checked every tree when it came, so this is a defect)."""
    if sum(batch.frame_counts) != len(frames):
        raise ValueError(f"batch of step {batch.step} announces {sum(batch.frame_counts)} frames but has {len(frames)}")
    trees, at = [], 0
    for count in batch.frame_counts:
        trees.append(decode_tree(frames[at : at + count]))
        at += count
    return tuple(trees)


def group_trees(trees: Sequence[EpisodeTree]) -> tuple[EpisodeGroup, ...]:
    """Trees that belong together, groups in order of their first tree. Raises ValueError if a group mixes tasks."""
    members: dict[str, list[EpisodeTree]] = {}
    for tree in trees:
        members.setdefault(tree.group_id, []).append(tree)
    return tuple(EpisodeGroup(name, group[0].task, tuple(group)) for name, group in members.items())


def prepare(
    trees: Sequence[EpisodeTree],
    config: Config,
    *,
    current: int,
    shape: ModelShape,
    device: torch.device,
    ranks: Ranks = ALONE,
    memory: Memory = NOTHING,
) -> StepInput:
    """Credit, weigh and pack the trees of one step; `current` is the version about to be trained and `memory` what the
    step before handed on.

    Of several ranks each is given all trees and gets its own micro-batches; the rest is the same for all. A tree no
    model of this vocabulary and these roles can have made is filtered with the reason, so that a broken actor cannot
    stop the trainer.
    """
    defects = ((tree.tree_id, defect(tree, config, shape.vocabulary)) for tree in trees)
    filtered = {name: reason for name, reason in defects if reason is not None}
    groups = group_trees([tree for tree in trees if tree.tree_id not in filtered])
    ordered = [tree for group in groups for tree in group.trees]
    scheme = config.learner.credit
    by_group = [scheme.credit(group, memory) for group in groups]
    flat = [_is_flat(scores) for scores in by_group]
    if config.learner.zero_variance != "keep":
        for number in np.flatnonzero(flat):
            filtered |= {tree.tree_id: ZERO_VARIANCE for tree in groups[number].trees}
            by_group[number] = spread(groups[number], {})
    credited = [scores for group in by_group for scores in group]
    weights = token_weights(ordered, credited, without_frozen_roles(config))
    samples: list[Sample] = []
    for tree, scores, weighed in zip(ordered, credited, weights, strict=True):
        if all(score is None for score in scores):
            filtered.setdefault(tree.tree_id, UNSCORED)
        elif not any(weighed):
            filtered[tree.tree_id] = NO_TOKENS
        samples += _samples(tree, scores, weighed, config)
    return StepInput(
        micro_batches=pack(
            samples,
            limit_tokens=config.learner.micro_batch_tokens,
            device=device,
            shape=shape,
            ranks=ranks.count,
            rank=ranks.rank,
        ),
        samples=tuple(samples),
        trained=tuple(tree.tree_id for tree in ordered if tree.tree_id not in filtered),
        filtered=tuple(filtered.items()),
        memory=scheme.remember(memory, groups),
        report=_report(groups, len(filtered), len(samples), sum(flat), current),
    )


def defect(tree: EpisodeTree, config: Config, vocabulary: int) -> str | None:
    """Why a tree cannot be trained on whatever it scored; None for a sound one."""
    for trajectory in tree.trajectories:
        if trajectory.role not in config.episode.roles:
            return UNKNOWN_ROLE
        if len(trajectory.tokens) and int(trajectory.tokens.max()) >= vocabulary:
            return UNKNOWN_TOKEN
        if len(trajectory.sampled) and trajectory.sampled[0]:
            return SAMPLED_FIRST
    return None


def without_frozen_roles(config: Config) -> Learner:
    """The learner's settings with a factor of 0 for roles that the model plays as it started."""
    learner, lora = config.learner, config.model.lora
    factors = dict.fromkeys(() if lora is None else lora.frozen, 0.0)
    return learner.model_copy(update={"role_factors": {**learner.role_factors, **factors}})


def _is_flat(scores: GroupAdvantages) -> bool:
    """Whether a group was scored and yet says of no trajectory that it was better or worse than another."""
    found = [score for tree in scores for score in tree if score is not None]
    return bool(found) and max(map(abs, found)) < FLAT


def _samples(tree: EpisodeTree, scores: TreeAdvantages, weighed: TreeWeights, config: Config) -> list[Sample]:
    return [
        Sample(
            role=trajectory.role,
            tokens=trajectory.tokens,
            sampled=trajectory.sampled,
            behaviour=trajectory.logprobs,
            advantage=score,
            weight=weight,
            # Greedy sampling has no density; its tokens are then scored as drawn at temperature 1.
            temperature=config.episode.roles[trajectory.role].sampling.temperature or 1.0,
            adapter=("" if config.model.lora is None else config.model.lora.adapter_of(trajectory.role)) or "",
        )
        for trajectory, score, weight in zip(tree.trajectories, scores, weighed, strict=True)
        if score is not None and weight != 0
    ]


def _report(groups: Sequence[EpisodeGroup], filtered: int, trajectories: int, flat: int, current: int) -> IntakeReport:
    trees = [tree for group in groups for tree in group.trees]
    parts: dict[str, list[float]] = {}
    for tree in trees:
        for name, value in tree.rewards.items():
            if value is not None:
                parts.setdefault(name, []).append(value)
    answers = [[_answer(tree) for tree in group.trees] for group in groups]
    ages = [distance(version=tree.versions[0], current=current) for tree in trees if tree.versions]
    return IntakeReport(
        groups=len(groups),
        trees=len(trees),
        filtered_trees=filtered,
        trajectories=trajectories,
        reward_mean=_mean(parts.get("total", [])),
        reward_parts={name: _mean(values) for name, values in sorted(parts.items()) if name != "total"},
        all_fail_groups=_mean([float(max(group) <= 0) for group in answers]),
        all_pass_groups=_mean([float(min(group) >= 1) for group in answers]),
        zero_variance_groups=flat,
        staleness_mean=_mean([float(age) for age in ages]),
        staleness_max=max(ages, default=0),
        role_plays=role_plays(groups, current=current),
    )


def _answer(tree: EpisodeTree) -> float:
    """The answer's part of the reward; of trees without one, the whole reward."""
    value = tree.rewards.get("answer", tree.reward)
    return 0.0 if value is None else value


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
