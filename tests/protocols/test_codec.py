"""The tree codec: lossless, small, and deaf to nonsense."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocols import packing
from protocols.codec import FRAMES, MalformedTree, decode_header, decode_tree, encode_tree
from protocols.records import EpisodeTree, Task, ToolSpan, Trajectory, Turn, WeightStamp
from tests.protocols.strategies import assert_same_tree, trees

relaxed = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


def trajectory(
    tokens: list[int], *, sampled: int, role: str = "worker", parent: tuple[int, int] | None = None
) -> Trajectory:
    """A prompt and then `sampled` tokens of version 3 with log-probability -0.5."""
    prompt = len(tokens) - sampled
    return Trajectory(
        role=role,
        parent=parent,
        tokens=np.array(tokens, dtype=np.int32),
        sampled=np.arange(len(tokens)) >= prompt,
        logprobs=np.full(sampled, -0.5, dtype=np.float32),
        versions=np.full(sampled, 3, dtype=np.int32),
        turns=(
            Turn(kind="prompt", start=0, stop=prompt),
            Turn(kind="sampled", start=prompt, stop=len(tokens), stop_reason="stop"),
        ),
        status="done",
    )


def tree(*trajectories: Trajectory) -> EpisodeTree:
    return EpisodeTree(
        tree_id="t1",
        group_id="g1",
        lease_id="l1",
        episode=2,
        actor_id="a1",
        task=Task.make("Where?", ("Paris",)),
        trajectories=trajectories,
        rewards={"total": 0.9, "style": None},
        weights=(WeightStamp(version=3, digest="d3"),),
        tool_spans=(
            ToolSpan(
                trajectory=0, turn=1, call_id="c1", server="search", tool="search",
                outcome="infrastructure", started_s=0.5, seconds=0.25, result_bytes=7,
            ),
        ),
        started_at=1000.0,
        seconds=1.5,
    )  # fmt: skip


planner = trajectory([1, 2, 3, 4, 5], sampled=2, role="planner")


@relaxed
@given(trees())
def test_decoding_gives_back_exactly_the_tree_that_was_encoded(original: EpisodeTree) -> None:
    frames = encode_tree(original)
    assert len(frames) == FRAMES
    assert_same_tree(decode_tree(frames), original)
    assert_same_tree(decode_tree([memoryview(frame) for frame in frames]), original)


def test_the_header_says_what_the_hub_needs_without_the_arrays() -> None:
    header = decode_header(encode_tree(tree(planner, trajectory([7, 8, 9], sampled=1, parent=(0, 1))))[0])
    assert (header.tree_id, header.group_id, header.lease_id, header.episode) == ("t1", "g1", "l1", 2)
    assert (header.token_count, header.sampled_count) == (8, 3)
    assert (header.oldest_version, header.newest_version) == (3, 3)
    assert (header.roles, header.statuses) == (("planner", "worker"), ("done", "done"))
    assert (header.tool_calls, header.tool_failures, header.reward) == (1, 1, 0.9)


def test_a_prompt_that_workers_share_is_stored_once() -> None:
    prompt = list(range(10, 110))
    workers = [trajectory([*prompt, 200 + i], sampled=1, parent=(0, 1)) for i in range(4)]
    frames = encode_tree(tree(planner, *workers))
    # 5 planner tokens, the prompt once, one token of each of 4 workers: 109 ids of 2 bytes.
    assert len(frames[4]) == 2 * 109
    assert_same_tree(decode_tree(frames), tree(planner, *workers))


@pytest.mark.parametrize(("largest", "width"), [(65_535, 2), (65_536, 3), (2**24 - 1, 3), (2**24, 4)])
def test_token_ids_take_two_bytes_or_three_or_four_as_the_largest_needs(largest: int, width: int) -> None:
    original = tree(trajectory([0, largest, 1], sampled=1))
    frames = encode_tree(original)
    assert len(frames[4]) == 3 * width
    assert_same_tree(decode_tree(frames), original)


def test_a_tree_of_long_trajectories_takes_at_most_four_and_a_half_bytes_per_token() -> None:
    ids = np.random.default_rng(0).integers(0, 151_936, (20, 3000))
    workers = [trajectory(row.tolist(), sampled=600, parent=(0, 1)) for row in ids]
    frames = encode_tree(tree(planner, *workers))
    # 3 bytes an id, and 4 bytes of log-probability for every fifth token, is 3.8; the rest is the JSON.
    assert sum(map(len, frames)) / 60_005 < 3.9


def test_a_tree_beyond_the_limit_is_refused_before_it_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protocols.codec.MAX_TREE_TOKENS", 4)
    with pytest.raises(ValueError, match="tree t1 has 5 tokens"):
        encode_tree(tree(planner))


@settings(relaxed, max_examples=300)
@given(trees(), st.data())
def test_a_mutated_frame_gives_a_tree_or_malformed_tree_and_nothing_else(
    original: EpisodeTree, data: st.DataObject
) -> None:
    frames = encode_tree(original)
    at = data.draw(st.integers(0, FRAMES - 1), label="frame")
    frame = bytearray(frames[at])
    match data.draw(st.sampled_from(["flip", "cut", "extend", "insert"]), label="mutation"):
        case "flip" if frame:
            for _ in range(data.draw(st.integers(1, 3))):
                frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
        case "cut":
            del frame[data.draw(st.integers(0, len(frame))) :]
        case "extend":
            frame += data.draw(st.binary(min_size=1, max_size=16))
        case _:
            where = data.draw(st.integers(0, len(frame)))
            frame[where:where] = data.draw(st.binary(min_size=1, max_size=4))
    frames[at] = bytes(frame)
    try:
        decode_tree(frames)
    except MalformedTree as error:
        assert "\n" not in str(error)


@given(st.lists(st.binary(max_size=64), max_size=10))
def test_random_bytes_are_a_malformed_tree(frames: list[bytes]) -> None:
    with pytest.raises(MalformedTree):
        decode_tree(frames)


def test_every_missing_frame_is_a_malformed_tree() -> None:
    frames = encode_tree(tree(planner))
    for missing in range(FRAMES):
        with pytest.raises(MalformedTree, match="a tree is 8 frames, got 7"):
            decode_tree([*frames[:missing], *frames[missing + 1 :]])


def rewritten(frames: list[bytes], **changes: object) -> list[bytes]:
    return [orjson.dumps({**orjson.loads(frames[0]), **changes}), *frames[1:]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_count": 6}, "do not add up to the header's 6 tokens"),
        ({"token_count": 2**40}, "token_count"),
        ({"sampled_count": 3}, "expected 12|header's 3 sampled tokens"),
        ({"oldest_version": 2}, "versions 2 to 3"),
        ({"newest_version": 4}, "versions 3 to 4"),
        ({"tool_failures": 0}, "0 failed"),
        ({"token_bytes": 3}, "token frame is 10 bytes, expected 15"),
        ({"statuses": []}, "1 roles but 0 statuses"),
        ({"statuses": ["happy"]}, "statuses.0"),
        ({"roles": []}, "roles"),
        ({"weights": []}, "without a digest"),
        ({"surprise": 1}, "surprise"),
        ({"rewards": {"total": "NaN"}}, "rewards.total: Input should be a finite number"),
        ({"seconds": "NaN"}, "seconds"),
    ],
)
def test_a_header_that_does_not_fit_its_arrays_is_refused_with_the_reason(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(MalformedTree, match=message):
        decode_tree(rewritten(encode_tree(tree(planner)), **changes))


def int32(*rows: tuple[int, ...]) -> bytes:
    return np.array(rows, dtype="<i4").tobytes()


@pytest.mark.parametrize(
    ("frame", "content", "message"),
    [
        (2, int32((-1, -1, 5, 2, -1, 1)), "cannot share 1 tokens with trajectory -1"),
        (2, int32((-1, -1, 5, 2, 0, 5)), "cannot share 5 tokens with trajectory 0"),
        (2, int32((-1, -1, 5, 2, 0, 6)), "6 shared tokens"),
        (2, int32((-1, -1, 5, -2, -1, 0)), "-2 turns"),
        (2, int32((-1, -1, 5, 2**30, -1, 0)), "1073741824 turns"),
        (2, int32((0, 0, 5, 2, -1, 0)), "trajectory 0 names the unknown parent"),
        (3, int32((3, 0, 0, 0), (2, 9, 1, 0)), "out of range"),
        (3, int32((3, 0, 0, 0), (1, 1, 1, 0)), "turns cover 4 of 5 tokens"),
        (3, int32((3, 0, 0, 1), (2, 1, 1, 0)), "do not use the 0 call ids"),
        (5, np.array([1, 2**32 - 1, 2**32 - 1], dtype="<u4").tobytes(), "sampled runs do not add up"),
        (5, np.array([4, 1], dtype="<u4").tobytes(), "sampled runs choose 1 tokens"),
        (6, np.array([np.nan, -1], dtype="<f4").tobytes(), "not finite or above 0"),
        (6, np.array([0.5, -1], dtype="<f4").tobytes(), "not finite or above 0"),
        (7, int32((3, 2**31 - 1)), "version runs do not add up"),
        (7, int32((-3, 2)), "negative version"),
        (7, int32((3, 2), (3, 0)), "empty run"),
    ],
)
def test_arrays_out_of_range_are_refused_with_the_reason(frame: int, content: bytes, message: str) -> None:
    frames = encode_tree(tree(planner))
    frames[frame] = content
    with pytest.raises(MalformedTree, match=message):
        decode_tree(frames)


def test_prefixes_that_multiply_cannot_make_a_small_message_allocate_much() -> None:
    frames = encode_tree(tree(planner))
    many = 4000
    rows = [(-1, -1, 65_536, 0, -1, 0), *[(0, 0, 65_536, 0, i, 65_536) for i in range(many - 1)]]
    header = {"roles": ["planner"] * many, "statuses": ["done"] * many, "token_count": 65_536 * many}
    frames = rewritten([frames[0], frames[1], int32(*rows), b"", bytes(2 * 65_536), *frames[5:]], **header)
    with pytest.raises(MalformedTree, match="less than or equal to 16777216"):
        decode_tree(frames)


def test_the_shared_prefix_is_the_longest_of_the_first_and_the_latest_of_the_role() -> None:
    first = trajectory([1, 2, 3, 9], sampled=1)
    latest = trajectory([1, 2, 3, 4, 5], sampled=1, parent=(0, 0))
    mine = trajectory([1, 2, 3, 4, 6], sampled=1, parent=(0, 0))
    other = replace(mine, role="critic")
    assert packing.shared_prefixes([first, latest, mine]) == [(-1, 0), (0, 3), (1, 4)]
    assert packing.shared_prefixes([first, latest, other])[2] == (-1, 0)
