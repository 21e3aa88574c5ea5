"""Random but well-formed records, for any test that wants to be shown odd trees."""

from __future__ import annotations

from typing import get_args

import numpy as np
from hypothesis import strategies as st

from protocols.records import (
    EpisodeTree,
    Joint,
    Outcome,
    Replay,
    Status,
    StopReason,
    Task,
    ToolSpan,
    Trajectory,
    Turn,
    TurnKind,
    WeightStamp,
)

names = st.text(min_size=1, max_size=8)
finite = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | finite | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
tasks = st.builds(
    Task.make,
    st.text(max_size=40),
    st.lists(st.text(max_size=10), max_size=3).map(tuple),
    st.dictionaries(names, json_values, max_size=2),
    st.dictionaries(names, st.dictionaries(names, json_values, max_size=2), max_size=2),
)


@st.composite
def turns(draw: st.DrawFn, vocabulary: int) -> tuple[Turn, list[int], bool]:
    """A turn (from 0), its tokens, and whether the policy chose them."""
    kind: TurnKind = draw(st.sampled_from(get_args(TurnKind)))
    tokens = draw(st.lists(st.integers(0, vocabulary - 1), max_size=6))
    sampled = kind == "sampled"
    stop: StopReason | None = draw(st.sampled_from(get_args(StopReason))) if sampled else None
    answers = kind in ("tool_result", "worker_report")
    turn = Turn(kind=kind, start=0, stop=len(tokens), call_id=draw(names) if answers else None, stop_reason=stop)
    return turn, tokens, sampled


@st.composite
def trajectories(
    draw: st.DrawFn, parent: tuple[int, int] | None, prompts: list[list[int]], vocabulary: int, versions: list[int]
) -> Trajectory:
    """One trajectory that starts with one of the prompts."""
    prompt = draw(st.sampled_from(prompts))
    spans, tokens, flags = [Turn(kind="prompt", start=0, stop=len(prompt))], list(prompt), [False] * len(prompt)
    for turn, ids, sampled in draw(st.lists(turns(vocabulary), max_size=4)):
        spans.append(turn.model_copy(update={"start": len(tokens), "stop": len(tokens) + len(ids)}))
        tokens += ids
        # A cut or forced token inside a sampled turn is not the policy's choice: flags need not follow turns.
        flags += [sampled and draw(st.integers(0, 9)) > 0 for _ in ids]
    chosen = sum(flags)
    return Trajectory(
        role=draw(st.sampled_from(["planner", "worker", "critic"])),
        parent=parent,
        tokens=np.array(tokens, dtype=np.int32),
        sampled=np.array(flags, dtype=np.bool_),
        logprobs=np.array(
            draw(st.lists(st.floats(-50, 0, width=32), min_size=chosen, max_size=chosen)), dtype=np.float32
        ),
        versions=np.array(draw(st.lists(st.sampled_from(versions), min_size=chosen, max_size=chosen)), dtype=np.int32),
        turns=tuple(spans),
        status=draw(st.sampled_from(get_args(Status))),
    )


@st.composite
def trees(draw: st.DrawFn) -> EpisodeTree:
    """A tree of up to 5 trajectories, of small, large and huge vocabularies, possibly without a single token."""
    vocabulary = draw(st.sampled_from([5, 1 << 16, 200_000, 2**31 - 1]))
    prompts = draw(st.lists(st.lists(st.integers(0, vocabulary - 1), max_size=12), min_size=1, max_size=2))
    versions = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=3, unique=True))
    members: list[Trajectory] = []
    for index in range(draw(st.integers(1, 5))):
        parent = None
        if index and draw(st.integers(0, 9)):
            above = draw(st.integers(0, index - 1))
            parent = (above, draw(st.integers(0, len(members[above].turns) - 1)))
        members.append(draw(trajectories(parent, prompts, vocabulary, versions)))
    joints: list[Joint] = []
    for index in range(draw(st.integers(0, 3))):
        joints.append(
            Joint(
                members=tuple(draw(st.lists(st.integers(0, len(members) - 1), min_size=1, max_size=3))),
                after=draw(st.none() | st.integers(0, index - 1)) if index else None,
                reward=draw(st.none() | finite),
            )
        )
    span = st.builds(
        ToolSpan,
        trajectory=st.integers(0, len(members) - 1),
        turn=st.integers(0, 3),
        call_id=names,
        server=names,
        tool=names,
        outcome=st.sampled_from(get_args(Outcome)),
        started_s=finite,
        seconds=finite,
        result_bytes=st.integers(0, 2**40),
    )
    replays: list[Replay] = []
    if len(members) > 1 and draw(st.booleans()):
        own = draw(st.integers(1, len(members) - 1))
        for alternative in range(own, len(members)):
            decided = draw(st.integers(0, own - 1))
            turn = draw(st.integers(0, len(members[decided].turns) - 1))
            reward = draw(st.none() | finite)
            replays.append(Replay(trajectory=decided, turn=turn, alternative=alternative, reward=reward))
    return EpisodeTree(
        tree_id=draw(names),
        group_id=draw(names),
        lease_id=draw(names),
        episode=draw(st.integers(0, 1000)),
        actor_id=draw(names),
        task=draw(tasks),
        trajectories=tuple(members),
        rewards=draw(st.dictionaries(names, st.none() | finite, max_size=3)),
        weights=tuple(WeightStamp(version=version, digest=f"{version:032x}") for version in versions),
        tool_spans=tuple(draw(st.lists(span, max_size=3))),
        started_at=draw(finite),
        seconds=draw(finite),
        earned=tuple(draw(st.lists(st.none() | finite, min_size=len(members), max_size=len(members))))
        if draw(st.booleans())
        else (),
        joints=tuple(joints),
        replays=tuple(replays),
    )


def assert_same_tree(one: EpisodeTree, other: EpisodeTree) -> None:
    """Equal in every field; arrays bit for bit and of the records' own types."""
    for name in ("tree_id", "group_id", "lease_id", "episode", "actor_id", "task", "rewards", "weights"):
        assert getattr(one, name) == getattr(other, name), name
    assert (one.tool_spans, one.started_at, one.seconds) == (other.tool_spans, other.started_at, other.seconds)
    assert (one.earned, one.joints, one.replays) == (other.earned, other.joints, other.replays)
    assert len(one.trajectories) == len(other.trajectories)
    for mine, theirs in zip(one.trajectories, other.trajectories, strict=True):
        assert (mine.role, mine.parent, mine.turns, mine.status) == (
            theirs.role,
            theirs.parent,
            theirs.turns,
            theirs.status,
        )
        for field in ("tokens", "sampled", "logprobs", "versions"):
            left, right = getattr(mine, field), getattr(theirs, field)
            assert (left.dtype, left.tobytes()) == (right.dtype, right.tobytes()), field
