"""Messages that are well formed and make no sense: the hub answers or ignores them, and its ledger stays exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocols.channel import HubInput, Received
from protocols.codec import encode_tree
from protocols.messages import (
    LARGEST,
    BatchRequest,
    ChunkRequest,
    Goodbye,
    Heartbeat,
    Hello,
    LeaseRequest,
    Publish,
    Refuse,
    StepDone,
    TrainerHello,
    TreeUpload,
    WeightObject,
    WeightsLoaded,
)
from tests.learner.hub.bench import Bench, bench, make_tree

NUMBERS = st.one_of(st.integers(0, 3), st.integers(0, LARGEST))
NAMES = st.one_of(
    st.sampled_from(["actor-0", "train-000001.0", "keyframe-0.bin", "../x", "", "weights-0"]), st.text(max_size=200)
)
IDS = st.sampled_from(["actor-0", "actor-1", "x"])
SMALL = st.integers(0, 2**20)
OBJECTS = st.builds(
    WeightObject,
    name=st.sampled_from(["keyframe-0.bin", "other.bin"]),
    kind=st.just("keyframe"),
    version=NUMBERS,
    base=st.none(),
    size_bytes=NUMBERS,
    digest=NAMES,
)
MESSAGES: st.SearchStrategy[HubInput] = st.one_of(
    st.builds(Hello, protocol=NUMBERS, actor_id=IDS, tokenizer_digest=NAMES, config_digest=NAMES, capacity=SMALL),
    st.builds(LeaseRequest, episodes=NUMBERS),
    st.builds(
        Heartbeat,
        leases=st.tuples(NAMES, NAMES),
        version=NUMBERS,
        live_episodes=NUMBERS,
        outbox_trees=NUMBERS,
        sampled_tokens=NUMBERS,
    ),
    st.builds(ChunkRequest, name=NAMES, offset=NUMBERS, size_bytes=st.integers(1, 100)),
    st.builds(WeightsLoaded, version=NUMBERS, digest=NAMES, pause_s=st.just(0.0)),
    st.builds(TreeUpload, tree_id=NAMES),
    st.builds(Goodbye, reason=NAMES),
    st.builds(TrainerHello, protocol=NUMBERS, step=NUMBERS, config_digest=NAMES),
    st.builds(BatchRequest, step=NUMBERS),
    st.builds(StepDone, step=NUMBERS, trained=st.tuples(NAMES), filtered=st.tuples(st.tuples(NAMES, NAMES))),
    st.builds(Publish, version=NUMBERS, digest=NAMES, objects=st.tuples(OBJECTS)),
)


def ready(folder: Path) -> Bench:
    made = Bench(folder)
    made.start()
    made.ask(4)
    return made


def test_nonsense_neither_ends_the_hub_nor_moves_its_ledger(tmp_path: Path) -> None:
    at = ready(tmp_path)
    before = at.ledger

    @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        side=st.sampled_from(["actors", "trainer"]),
        peer=st.sampled_from([b"stranger", b"trainer"]),
        message=MESSAGES,
        frames=st.lists(st.binary(max_size=20), max_size=9),
    )
    def say(side: str, peer: bytes, message: HubInput, frames: list[bytes]) -> None:
        received = Received(peer, message, tuple(memoryview(frame) for frame in frames))
        at.step([("actors" if side == "actors" else "trainer", received)])

    say()
    assert at.ledger == before
    at.check()
    at.close()


def test_a_damaged_tree_is_refused_or_unharmed_but_never_half_in(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        tree = make_tree(at.ask(2)[0], 0)
        frames = encode_tree(tree)

        @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
        @given(which=st.integers(0, 7), place=st.integers(0, 10_000), value=st.integers(0, 255))
        def damage(which: int, place: int, value: int) -> None:
            broken = [bytearray(frame) for frame in frames]
            if broken[which]:
                broken[which][place % len(broken[which])] = value
            at.upload_frames(tree.tree_id, [bytes(frame) for frame in broken])

        damage()
        assert at.ledger.trees <= 1


@pytest.mark.parametrize("group_id", ["train-²", "train-٣", "train-1", "train-0", "-1", "", "train-" + "9" * 150])
def test_a_tree_of_a_group_that_was_never_opened_is_refused_whatever_its_number(tmp_path: Path, group_id: str) -> None:
    with bench(tmp_path) as at:
        at.start()
        tree = make_tree(at.ask(2)[0], 0)
        (answer,) = at.upload(replace(tree, group_id=group_id))
        assert isinstance(answer, Refuse) and answer.reason == "unknown_lease"
        at.upload(tree)
        assert at.ledger.trees == 1
