"""What the hub answers: who may come in, what is refused, weights, waits, the order of tasks."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.hub.conditions import conditions, reported_waits
from learner.hub.journal import Journal, JournalUnreadable
from learner.hub.roster import GONE_S
from learner.hub.tasks import TaskCursor
from learner.hub.weights import KEYFRAMES_KEPT
from matpo.waits import WaitBook, waiting
from protocols.codec import encode_tree
from protocols.messages import (
    BatchRequest,
    Chunk,
    ChunkRequest,
    Drain,
    HubMessage,
    NotYet,
    Ok,
    Publish,
    Refuse,
    RefuseReason,
    TrainerBeat,
    TreeUpload,
    WeightObject,
    WeightsLoaded,
    WeightsReady,
    Welcome,
)
from protocols.records import Task
from tests.learner.hub.bench import bench, digest_of, make_config, make_tasks, make_tree


def reason(answers: list[HubMessage]) -> RefuseReason:
    (answer,) = answers
    assert isinstance(answer, Refuse), answer
    return answer.reason


def test_an_actor_is_welcomed_and_told_of_the_weights(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.trainer_hello()
        at.publish(0)
        welcome, ready = at.hello()
        assert welcome == Welcome(run="bench", heartbeat_s=1.0)
        assert isinstance(ready, WeightsReady) and (ready.version, ready.digest) == (0, digest_of(0))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"protocol": 99}, "wrong_protocol"),
        ({"tokenizer_digest": "other"}, "wrong_config"),
        ({"config_digest": "other"}, "wrong_config"),
    ],
)
def test_an_actor_of_another_kind_is_refused(tmp_path: Path, change: dict[str, object], expected: RefuseReason) -> None:
    with bench(tmp_path) as at:
        assert reason(at.send("actors", "actor-0", at.hello_message().model_copy(update=change))) == expected


def test_who_did_not_say_hello_is_told_to(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        assert reason(at.beat()) == "unknown_peer"


def test_trainer_messages_are_refused_on_the_actors_socket_and_the_other_way_round(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        assert reason(at.send("actors", "actor-0", BatchRequest(step=1))) == "unexpected"
        assert reason(at.send("trainer", "trainer", at.hello_message())) == "unexpected"
        assert at.hub.refused == {"unexpected": 2}


def test_a_tree_of_weights_nobody_published_is_refused(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        assert reason(at.upload(make_tree(at.ask(2)[0], 0, version=3))) == "unknown_weights"
        assert at.ledger.trees == 0


def test_a_tree_of_a_lease_from_another_run_is_refused(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        lease = at.ask(2)[0]
        for change in ({"lease_id": "train-000009.0"}, {"group_id": "x"}, {"task": make_tasks(1, "other")[0]}):
            assert reason(at.upload(make_tree(lease.model_copy(update=change), 0))) == "unknown_lease"
        assert reason(at.upload(make_tree(lease, 7))) == "unknown_lease"


def test_a_tree_that_makes_no_sense_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        tree = make_tree(at.ask(2)[0], 0)
        frames = encode_tree(tree)
        upload = TreeUpload(tree_id=tree.tree_id)
        for broken in ([], frames[:-1], [b"{}", *frames[1:]], [*frames[:4], frames[4][:-1], *frames[5:]]):
            assert reason(at.send("actors", "actor-0", upload, broken)) == "malformed"
        assert reason(at.send("actors", "actor-0", TreeUpload(tree_id="another"), frames)) == "malformed"
        assert at.ledger.trees == 0


def test_weights_loaded_with_a_wrong_digest_are_refused(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        message = WeightsLoaded(version=0, digest="other", pause_s=0.0)
        assert reason(at.send("actors", "actor-0", message)) == "unknown_weights"


def test_a_swap_is_recorded_with_its_pause_and_how_far_behind_the_publication_it_came(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        at.now_s += 1.5
        at.send("actors", "actor-0", WeightsLoaded(version=0, digest=digest_of(0), pause_s=0.25))
        (swap,) = at.hub.swaps
        assert (swap.actor_id, swap.version, swap.pause_s, swap.behind_s) == ("actor-0", 0, 0.25, 1.5)


def test_weights_are_served_in_pieces(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.trainer_hello()
        at.hello()
        at.publish(0, b"0123456789")
        request = ChunkRequest(name="keyframe-0.bin", offset=8, size_bytes=4)
        (outgoing,) = at.step([at.arrival_of(request)])
        assert outgoing.message == Chunk(name="keyframe-0.bin", offset=8)
        assert [bytes(frame) for frame in outgoing.frames] == [b"89"]
        outside = ChunkRequest(name="keyframe-0.bin", offset=10, size_bytes=4)
        assert reason(at.send("actors", "actor-0", outside)) == "malformed"
        unknown = ChunkRequest(name="../journal.sqlite", offset=0, size_bytes=4)
        assert reason(at.send("actors", "actor-0", unknown)) == "unknown_object"


def test_old_weight_files_are_deleted_and_a_download_under_way_goes_on(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.trainer_hello()
        at.hello()
        at.publish(0, b"first")
        (outgoing,) = at.step([at.arrival_of(ChunkRequest(name="keyframe-0.bin", offset=0, size_bytes=5))])
        for version in range(1, KEYFRAMES_KEPT + 1):
            at.publish(version)
        assert at.hub.weights.delete_old() == ["keyframe-0.bin"]
        assert not (tmp_path / "weights" / "keyframe-0.bin").exists()
        assert bytes(outgoing.frames[0]) == b"first"
        at.restart()
        ready = at.hub.weights.announcement()
        assert ready is not None and [entry.version for entry in ready.objects] == [1, 2, 3]


def test_weights_without_their_file_are_refused(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.trainer_hello()
        entry = WeightObject(name="none.bin", kind="keyframe", version=0, base=None, size_bytes=3, digest="x")
        message = Publish(version=0, digest="d", objects=(entry,))
        assert reason(at.send("trainer", "trainer", message)) == "unknown_object"


def test_a_publication_sent_twice_is_one_and_with_another_digest_is_refused(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.trainer_hello()
        assert at.publish(0) == Ok() and at.publish(0) == Ok()
        entry = WeightObject(name="keyframe-0.bin", kind="keyframe", version=0, base=None, size_bytes=7, digest="x")
        message = Publish(version=0, digest="another", objects=(entry,))
        assert reason(at.send("trainer", "trainer", message)) == "unexpected"


def test_draining_takes_leases_back_sends_actors_home_and_lets_nobody_in(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        at.ask(2)
        with at.journal.transaction():
            at.hub.drain("test")
        (outgoing,) = at.hub.take_outgoing()
        assert outgoing.message == Drain(reason="test")
        assert (at.ledger.leases_live, at.ledger.episodes_waiting) == (0, 2)
        assert reason(at.hello("actor-1")) == "draining"
        assert at.ask(2) == []


def test_waits_are_named_and_have_a_remedy(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        assert [c.what for c in conditions(at.hub, at.now_s)] == ["the first weights", "an actor"]
        at.start()
        assert list(conditions(at.hub, at.now_s)) == []
        at.batch(1)
        (batch,) = conditions(at.hub, at.now_s)
        assert (batch.who, batch.what) == ("trainer", "the batch of step 1")
        at.step(seconds=5.0)
        silent = [c for c in conditions(at.hub, at.now_s) if c.what == "a heartbeat of actor-0"]
        assert len(silent) == 1 and "actor-0.jsonl" in silent[0].remedy


def test_an_actor_whose_machine_was_taken_away_is_waited_for_for_an_hour(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        at.hello("actor-1")
        at.step(seconds=GONE_S - 60.0)
        at.beat(actor="actor-1")
        at.step(seconds=59.0)
        assert {"a heartbeat of actor-0", "a heartbeat of actor-1"} <= {c.what for c in conditions(at.hub, at.now_s)}
        at.step(seconds=2.0)
        assert "a heartbeat of actor-0" not in {c.what for c in conditions(at.hub, at.now_s)}
        assert [actor.actor_id for actor in at.hub.roster.everyone()] == ["actor-1"]
        assert reason(at.beat(actor="actor-0")) == "unknown_peer", "and may say hello again"


def test_the_wait_for_a_batch_grows_into_a_stall_though_the_trainer_is_told_in_between_that_there_is_none(
    tmp_path: Path,
) -> None:
    with bench(tmp_path) as at:
        at.start()
        book, began = WaitBook("hub"), at.now_s
        at.batch(1)
        book.update(conditions(at.hub, at.now_s), at.now_s)
        while at.now_s - began < 61.0:  # the status is read where the answer has just left and in other moments
            (answer,) = [o.message for o in at.step(seconds=1.0) if o.side == "trainer"]
            assert isinstance(answer, NotYet)
            waits = book.update(conditions(at.hub, at.now_s), at.now_s)
            at.batch(1)
        (batch,) = [wait for wait in waits if wait.name == "batch"]
        assert batch.since_s == at.now_s - began > batch.limit_s
        for lease in at.ask(4):
            at.play(lease)
        assert [c for c in conditions(at.hub, at.now_s) if c.name == "batch"] == [], "it has its batch"


def test_what_the_trainer_is_busy_with_is_shown_until_it_falls_silent(tmp_path: Path) -> None:
    busy = WaitBook("trainer").update([waiting("step", step=1)], 0.0)
    with bench(tmp_path) as at:
        at.start()
        assert at.send("trainer", "trainer", TrainerBeat(waits=busy)) == [Ok()]
        assert list(reported_waits(at.hub, at.now_s)) == list(busy)
        at.step(seconds=11.0)
        at.hello()
        assert list(reported_waits(at.hub, at.now_s)) == []
        (silent,) = conditions(at.hub, at.now_s)
        assert (silent.name, silent.since_s) == ("trainer", at.now_s - 11.0)
        assert "it last waited for step 1 to be computed" in silent.remedy
        at.trainer_hello()
        assert list(conditions(at.hub, at.now_s)) == []


def test_every_epoch_asks_every_task_once_in_an_order_of_its_own() -> None:
    cursor = TaskCursor(make_tasks(20), seed=3)

    def epoch(number: int) -> list[Task]:
        return [cursor.task(20 * number + place) for place in range(20)]

    ids = [[task.task_id for task in epoch(number)] for number in (0, 1)]
    assert len(set(ids[0])) == len(set(ids[1])) == 20
    assert ids[0] != ids[1]
    assert [task.task_id for task in epoch(0)] == ids[0]


def test_tasks_go_on_where_they_were_after_a_restart(tmp_path: Path) -> None:
    with bench(tmp_path, make_config(freshness={"eta": 9}, run={"steps": 20})) as at:
        at.start()
        before = at.ask(10)
        at.restart()
        at.hello()
        after = at.ask(10)
        cursor = TaskCursor(at.train, at.config.run.seed)
        assert [lease.task for lease in (*before, *after)] == [cursor.task(place) for place in range(10)]


def test_a_file_that_is_no_journal_is_named(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    path.write_bytes(b"not a database, surely not one of ours" * 100)
    with pytest.raises(JournalUnreadable, match=r"journal\.sqlite.*start a new run"), Journal.open(path):
        pass
    with pytest.raises(JournalUnreadable, match="does not exist"), Journal.open_read_only(tmp_path / "none"):
        pass


def test_weight_files_that_a_killed_trainer_never_announced_go_when_the_next_begins(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        for name in ("keyframe-1.bin", ".keyframe-1.bin.4711"):
            (tmp_path / "weights" / name).write_bytes(b"written and never announced")
        at.restart()
        assert len(list((tmp_path / "weights").iterdir())) == 3
        assert at.trainer_hello() == 1
        assert [path.name for path in (tmp_path / "weights").iterdir()] == ["keyframe-0.bin"]
