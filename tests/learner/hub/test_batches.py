"""Batches, steps and lineages: oldest first, the same batch again, what a resumed learner gets back."""

from __future__ import annotations

from pathlib import Path

from learner.hub.batches import split_frames
from protocols.codec import decode_tree
from protocols.messages import Batch, BatchRequest, NotYet, Ok, Refuse, StepDone
from protocols.records import version_of
from tests.learner.hub.bench import Bench, bench, make_config, make_tree


def play_all(at: Bench, episodes: int, *, version: int = 0) -> list[str]:
    """Lease and play so many episodes; returns the group ids in their order."""
    leases = at.ask(episodes)
    for lease in leases:
        at.play(lease, version=version)
    return [lease.group_id for lease in leases]


def test_a_batch_is_the_oldest_complete_groups_and_their_trees_come_as_sent(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        leases = at.ask(6)
        for lease in (leases[2], leases[1], leases[0]):
            at.play(lease)
        frames = next(message for message in at.step([at.batch_request(1)]) if isinstance(message.message, Batch))
        assert isinstance(frames.message, Batch)
        counts, rest, trees = frames.message.frame_counts, list(frames.frames), []
        for count in counts:
            trees.append(decode_tree(rest[:count]))
            rest = rest[count:]
        assert [tree.tree_id for tree in trees] == [
            f"{lease.lease_id}/{episode}" for lease in leases[:2] for episode in (0, 1)
        ]


def test_a_trainer_waits_for_its_batch_and_gets_it_when_the_last_tree_comes(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        leases = at.ask(4)
        at.play(leases[0])
        assert at.send("trainer", "trainer", BatchRequest(step=1)) == []
        at.upload(make_tree(leases[1], 0))
        (batch,) = [o for o in at.step([at.arrival(make_tree(leases[1], 1))]) if o.side == "trainer"]
        assert isinstance(batch.message, Batch)


def test_a_trainer_that_waits_is_told_so(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        assert at.batch(1) is None
        (outgoing,) = at.step(seconds=1.0)
        assert isinstance(outgoing.message, NotYet)


def test_asking_again_gives_the_same_batch_though_older_groups_came_in(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        leases = at.ask(6)
        at.play(leases[1])
        at.play(leases[2])
        at.batch(1)
        first = at.batch_trees(1)
        at.play(leases[0])
        at.restart()
        at.batch(1)
        assert at.batch_trees(1) == first


def test_a_step_reported_twice_is_counted_once(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        play_all(at, 4)
        trained = at.train_step(1)
        assert at.send("trainer", "trainer", StepDone(lineage=0, step=1, trained=tuple(trained), filtered=())) == [Ok()]
        assert at.ledger.trained == 4
        assert at.hub.batches.step == 1


def test_a_step_with_other_trees_than_its_batch_is_refused(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        play_all(at, 4)
        at.batch(1)
        (answer,) = at.send("trainer", "trainer", StepDone(lineage=0, step=1, trained=("nonsense",), filtered=()))
        assert isinstance(answer, Refuse) and "not the 4 of its batch" in answer.detail
        assert at.ledger.pending == 4


def test_a_batch_out_of_turn_is_refused(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        (answer,) = at.send("trainer", "trainer", BatchRequest(step=3))
        assert isinstance(answer, Refuse) and answer.detail.endswith("the next step is 1")


def test_trees_the_trainer_leaves_out_are_filtered_with_its_reason(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        play_all(at, 4)
        at.batch(1)
        first = at.batch_trees(1)[0]
        at.train_step(1, filtered=[(first, "nothing_to_train")])
        assert at.states()[first] == ("filtered", "nothing_to_train")
        assert (at.ledger.trained, at.ledger.filtered) == (3, 1)


def test_stale_trees_are_filtered_and_counted(tmp_path: Path) -> None:
    config = make_config(freshness={"eta": 3, "max_staleness_steps": 1}, learner={"groups_per_step": 1})
    with bench(tmp_path, config) as at:
        at.start()
        leases = at.ask(8)
        for lease in leases[:3]:
            at.play(lease)
        at.train_step(1)
        at.train_step(2)  # of age 1: just fresh enough
        assert at.batch(3) is None  # of age 2
        assert at.ledger.filtered_by == {"stale": 2}
        at.play(leases[3], version=1)
        at.train_step(3)
        assert at.ledger.trained == 6


def test_groups_without_variance_are_filtered_at_once_if_so_configured(tmp_path: Path) -> None:
    with bench(tmp_path, make_config(learner={"zero_variance": "resample"})) as at:
        at.start()
        (lease,) = at.ask(2)
        at.play(lease, rewards=(1.0, 1.0))
        assert at.ledger.filtered_by == {"zero_variance": 2}
        assert at.hub.leases.in_flight() == 0


def test_the_first_trainer_has_lineage_0_and_a_resumed_one_the_next(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        assert at.trainer_hello() == 0
        assert at.trainer_hello() == 0  # asked again: nothing has happened in between
        at.publish(0)
        assert at.trainer_hello() == 1


def test_resuming_returns_what_was_trained_later_and_gives_the_same_batches_again(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        play_all(at, 8)
        one = at.train_step(1)
        two = at.train_step(2)
        assert at.trainer_hello(1) == 1
        assert at.ledger.trained == 4
        assert {tree for tree, (state, _) in at.states().items() if state == "pending"} == set(two)
        at.publish(version_of(lineage=1, step=1))
        assert at.train_step(2, lineage=1) == two
        assert {t: s for t, (s, _) in at.states().items()} == dict.fromkeys([*one, *two], "trained")
        at.check()


def test_resuming_returns_what_the_trainer_had_filtered(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        play_all(at, 4)
        at.batch(1)
        first = at.batch_trees(1)[0]
        at.train_step(1, filtered=[(first, "nothing_to_train")])
        at.trainer_hello(0)
        assert at.states()[first] == ("pending", None)


def test_a_batch_planned_with_stale_trees_left_out_is_the_same_after_resuming(tmp_path: Path) -> None:
    config = make_config(
        learner={"groups_per_step": 1, "group_size": 3}, freshness={"eta": 3, "max_staleness_steps": 1}
    )
    with bench(tmp_path, config) as at:
        at.start()
        leases = at.ask(9)
        at.play(leases[0])
        at.play(leases[1])
        at.train_step(1)
        at.train_step(2)
        at.upload(make_tree(leases[2], 0, version=0))  # of age 2 at step 3
        at.upload(make_tree(leases[2], 1, version=1))
        at.upload(make_tree(leases[2], 2, version=2))
        third = at.train_step(3)
        assert len(third) == 2
        at.trainer_hello(1)
        at.publish(version_of(lineage=1, step=1))
        at.train_step(2, lineage=1)
        assert at.train_step(3, lineage=1) == third


def test_resuming_beyond_the_ledger_is_refused(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        answers = at.send("trainer", "trainer", at.trainer_hello_message(step=7))
        assert isinstance(answers[0], Refuse) and "the ledger ends at 0" in answers[0].detail


def test_actors_go_on_while_the_trainer_is_away_until_admission_is_full(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        for _ in range(3):
            play_all(at, 100)
        assert at.ledger.pending == 8


def test_staleness_at_training_time_is_written_down(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        play_all(at, 8)
        at.train_step(1)
        at.train_step(2)
        rows = at.journal.rows("SELECT step, MAX(staleness) FROM trees GROUP BY step ORDER BY step")
        assert rows == [(1, 0), (2, 1)]


def test_frames_are_split_as_they_were_joined() -> None:
    assert [bytes(frame) for frame in split_frames(("[2,0,1]", b"abc"))] == [b"ab", b"", b"c"]


def test_what_a_killed_trainer_said_is_refused_once_another_has_taken_its_place(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        play_all(at, 4)
        assert at.batch(1) is not None
        late = StepDone(lineage=0, step=1, trained=tuple(at.batch_trees(1)), filtered=())
        assert at.trainer_hello(0) == 1
        (answer,) = at.send("trainer", "trainer", late)
        assert isinstance(answer, Refuse) and "lineage 1 has taken its place" in answer.detail
        refused = at.publish(version_of(lineage=0, step=1))
        assert isinstance(refused, Refuse) and "lineage 1 has taken its place" in refused.detail
        assert (at.ledger.pending, at.hub.batches.step) == (4, 0)
        assert at.publish(version_of(lineage=0, step=0)) == Ok()  # said twice: known already
        at.train_step(1, lineage=1)
        assert at.ledger.trained == 4
