"""Records refuse what cannot be, and say which part and why."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from pydantic import ValidationError

from protocols.messages import (
    MESSAGE,
    ActorMessage,
    BatchRequest,
    ChunkRequest,
    HubMessage,
    Lease,
    TrainerMessage,
    WeightObject,
)
from protocols.records import (
    EpisodeGroup,
    EpisodeTree,
    Joint,
    Replay,
    Task,
    Trajectory,
    Turn,
    WeightStamp,
    lineage_of,
    step_of,
    version_of,
)
from tests.protocols.strategies import tasks

TASK = Task.make("Where?", ("Paris",))
TRAJECTORY = Trajectory(
    role="planner",
    parent=None,
    tokens=np.array([5, 6, 7], dtype=np.int32),
    sampled=np.array([False, True, True]),
    logprobs=np.array([-0.5, -1.5], dtype=np.float32),
    versions=np.array([3, 4], dtype=np.int32),
    turns=(Turn(kind="prompt", start=0, stop=1), Turn(kind="sampled", start=1, stop=3, stop_reason="stop")),
    status="done",
)
TREE = EpisodeTree(
    tree_id="t",
    group_id="g",
    lease_id="l",
    episode=0,
    actor_id="a",
    task=TASK,
    trajectories=(TRAJECTORY,),
    rewards={"total": 0.5},
    weights=(WeightStamp(version=4, digest="d4"), WeightStamp(version=3, digest="d3")),
    tool_spans=(),
    started_at=0.0,
    seconds=1.0,
)


def test_a_version_is_a_lineage_and_a_step() -> None:
    version = version_of(lineage=2, step=17)
    assert version == 2_000_017
    assert (lineage_of(version), step_of(version)) == (2, 17)


@pytest.mark.parametrize(("lineage", "step"), [(0, -1), (0, 1_000_000), (-1, 0), (2_000, 0)])
def test_a_version_that_does_not_fit_an_int32_is_refused(lineage: int, step: int) -> None:
    with pytest.raises(ValueError, match="version needs"):
        version_of(lineage=lineage, step=step)


def test_the_same_question_is_the_same_task_and_another_is_not() -> None:
    assert Task.make("Where?", ("Paris",)) == TASK
    assert Task.make("Where?", ("Rome",)).task_id != TASK.task_id
    assert Task.make("Where?", ("Paris",), {"hops": 2}).task_id != TASK.task_id


@settings(deadline=None)
@given(tasks)
def test_a_task_survives_json(task: Task) -> None:
    assert Task.model_validate_json(task.model_dump_json()) == task


def test_a_tree_counts_its_tokens_and_versions() -> None:
    assert (TREE.token_count, TREE.sampled_count, TREE.versions, TREE.reward) == (3, 2, (3, 4), 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampled": np.array([False, True])}, "3 tokens but 2 sampled flags"),
        ({"logprobs": np.zeros(1, np.float32)}, "sampled 2 tokens but has 1 logprobs"),
        ({"versions": np.zeros(3, np.int32)}, "2 logprobs and 3 versions"),
        ({"tokens": np.array([5, -6, 7], np.int32)}, "negative token id -6"),
        ({"logprobs": np.array([-1, np.nan], np.float32)}, "not finite or above 0"),
        ({"logprobs": np.array([-1, 0.1], np.float32)}, "not finite or above 0"),
        ({"versions": np.array([3, -1], np.int32)}, "negative weight version -1"),
        ({"turns": (Turn(kind="prompt", start=1, stop=3),)}, r"turn 0 spans \[1, 3\) but the one before ends at 0"),
        ({"turns": (Turn(kind="prompt", start=0, stop=2),)}, "turns cover 2 of 3 tokens"),
    ],
)
def test_a_trajectory_whose_parts_do_not_fit_is_refused_by_role_and_reason(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        replace(TRAJECTORY, **changes)  # type: ignore[arg-type]  # wrong on purpose
    assert str(caught.value).startswith("planner")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trajectories": ()}, "has no trajectory"),
        ({"trajectories": (replace(TRAJECTORY, parent=(0, 0)),)}, r"unknown parent turn \(0, 0\)"),
        ({"earned": (1.0, 0.0)}, "has 1 trajectories but says what 2 earned"),
        ({"earned": (float("nan"),)}, "not every act earned a finite number"),
        ({"joints": (Joint(members=(0, 1)),)}, "joint action 0 names what is not there"),
        ({"joints": (Joint(members=(0,), after=0),)}, "joint action 0 names what is not there"),
        ({"replays": (Replay(trajectory=0, turn=0, alternative=1, reward=None),)}, "a replay names what is not there"),
        ({"trajectories": (TRAJECTORY, replace(TRAJECTORY, parent=(1, 0)))}, r"unknown parent turn \(1, 0\)"),
        ({"trajectories": (TRAJECTORY, replace(TRAJECTORY, parent=(0, 2)))}, r"unknown parent turn \(0, 2\)"),
        ({"weights": (WeightStamp(version=3, digest="d"),)}, r"versions \[4\] without a digest"),
        ({"rewards": {"total": float("inf")}}, "reward 'total' is inf"),
    ],
)
def test_a_tree_whose_parts_do_not_fit_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TREE, **changes)  # type: ignore[arg-type]  # wrong on purpose


def test_a_group_holds_the_trees_of_one_task_only() -> None:
    assert len(EpisodeGroup("g", TASK, (TREE, TREE)).trees) == 2
    for stranger in (replace(TREE, group_id="h"), replace(TREE, task=Task.make("Who?", ("Ada",)))):
        with pytest.raises(ValueError, match="was given tree t of group"):
            EpisodeGroup("g", TASK, (stranger,))


def test_every_message_has_a_kind_of_its_own() -> None:
    kinds = [
        member.model_fields["kind"].default
        for union in (ActorMessage, TrainerMessage, HubMessage)
        for member in get_args(union)
    ]
    assert len(kinds) == len(set(kinds)) == 25


def test_a_message_is_read_back_as_what_it_was() -> None:
    lease = Lease(
        lease_id="l", group_id="g", task=TASK, episodes=(0, 1), purpose="train", min_version=-1, expires_s=60.0
    )
    for message in (lease, BatchRequest(step=3)):
        assert MESSAGE.validate_json(message.model_dump_json()) == message


@pytest.mark.parametrize("name", ["../escape", "/etc/passwd", ".hidden", "", "a/b", "a\n"])
def test_a_weight_object_cannot_name_a_file_outside_its_folder(name: str) -> None:
    with pytest.raises(ValidationError, match="name"):
        WeightObject(name=name, kind="keyframe", version=0, base=None, size_bytes=1, digest="x")


def test_a_chunk_request_is_for_a_real_and_bounded_range() -> None:
    for offset, size_bytes in ((-1, 1), (0, 0), (0, 2**40)):
        with pytest.raises(ValidationError):
            ChunkRequest(name="k", offset=offset, size_bytes=size_bytes)
