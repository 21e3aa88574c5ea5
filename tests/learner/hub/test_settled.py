"""What every kept checkpoint contains leaves the journal: when, where to, and that nothing is miscounted for it."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from pydantic import ValidationError

from learner.hub.journal import Journal
from learner.hub.settled import GROUPS_AT_ONCE, Settler, read_settled
from protocols.messages import Ack, Refuse, StepDone
from tests.learner.hub.bench import Bench, bench, make_config, make_tree


def settling(keep_trained: str, **changes: dict[str, object]) -> dict[str, dict[str, object]]:
    """Sections of a run of 40 steps that trains on one group of two trees a step."""
    sections: dict[str, dict[str, object]] = {
        "run": {"steps": 40},
        "learner": {"groups_per_step": 1, "group_size": 2},
        "hub": {"keep_trained": keep_trained},
    }
    return {name: sections.get(name, {}) | changes.get(name, {}) for name in {**sections, **changes}}


def take_steps(at: Bench, first: int, last: int, *, kept: int = 2) -> None:
    """Play and train steps `first` … `last`; a checkpoint is saved after every step and `kept` are kept."""
    for step in range(first, last + 1):
        for lease in at.ask(2):
            at.play(lease, version=step - 1)
        at.train_step(step, settled=max(0, step - kept))


def test_groups_leave_once_every_kept_checkpoint_contains_them(tmp_path: Path) -> None:
    with bench(tmp_path, make_config(**settling("drop"))) as at:
        at.start()
        take_steps(at, 1, 5)
        # At the request for step 5 the checkpoints of steps 3 and 4 were kept.
        assert sorted(at.trained_by_step()) == [4, 5]
        ledger = at.ledger
        assert (ledger.trees, ledger.trained, ledger.settled, ledger.tasks_trained) == (10, 10, 6, 5)
        assert read_settled(at.journal).upto_step == 3
        assert at.archived_states() == {}


def test_what_is_archived_is_found_as_if_it_had_never_left(tmp_path: Path) -> None:
    query = (
        "SELECT batches.step, group_id, tree_id, trees.state, LENGTH(data) FROM batches, json_each(batches.groups)"
        " JOIN groups ON groups.seq = value JOIN trees ON group_seq = groups.seq JOIN frames ON tree_seq = trees.seq"
        " ORDER BY batches.step, tree_id"
    )
    found = {}
    for keep in ("all", "archive"):
        folder = tmp_path / keep
        folder.mkdir()
        with bench(folder, make_config(**settling(keep))) as at:
            at.start()
            take_steps(at, 1, 6)
            assert len(at.archived_states()) == (8 if keep == "archive" else 0)
            assert at.journal.number("SELECT COUNT(*) FROM batches") == (2 if keep == "archive" else 6)
        with Journal.open_read_only(folder / "journal.sqlite", folder / "archive.sqlite") as journal:
            found[keep] = journal.rows(query)
    assert len(found["all"]) == 12
    assert found["archive"] == found["all"]


def test_a_hub_killed_between_copying_and_removing_copies_again(tmp_path: Path) -> None:
    with bench(tmp_path, make_config(**settling("all"))) as at:
        at.start()
        take_steps(at, 1, 4)
        for _ in range(2):
            settler = Settler(at.journal, archive=at.archive)
            settler.allow(3)
            at.journal.execute("BEGIN")
            assert settler.settle_some() == 3
            assert len(at.archived_states()) == 6
            at.journal.execute("ROLLBACK")
        assert at.ledger.settled == 0
        with Journal.open_read_only(tmp_path / "journal.sqlite", at.archive) as both:
            assert both.number("SELECT COUNT(*) FROM trees") == 8
            assert both.number("SELECT COUNT(*) FROM batches") == 4


def test_many_groups_leave_a_few_at_a_time(tmp_path: Path) -> None:
    with bench(tmp_path, make_config(**settling("all"))) as at:
        at.start()
        take_steps(at, 1, GROUPS_AT_ONCE + 3)
        settler = Settler(at.journal, archive=None)
        settler.allow(GROUPS_AT_ONCE + 2)
        assert [settler.settle_some() for _ in range(3)] == [GROUPS_AT_ONCE, 2, 0]


def test_a_tree_of_a_settled_group_is_acknowledged_and_counted_as_late_only(tmp_path: Path) -> None:
    with bench(tmp_path, make_config(**settling("drop"))) as at:
        at.start()
        (lease,) = at.ask(2)
        at.play(lease)
        at.train_step(1)
        take_steps(at, 2, 5)
        for late in (make_tree(lease, 0), make_tree(lease, 1, tree_id="another")):
            assert at.upload(late) == [Ack(tree_id=late.tree_id)]
        assert (at.ledger.trees, at.ledger.late) == (10, 2)
        other_run = lease.model_copy(update={"group_id": "train-000099"})
        assert isinstance(at.upload(make_tree(other_run, 0))[0], Refuse)


def test_groups_are_numbered_on_after_all_of_them_have_left(tmp_path: Path) -> None:
    with bench(tmp_path, make_config(**settling("drop"))) as at:
        at.start()
        take_steps(at, 1, 3)
        settler = Settler(at.journal, archive=None)
        settler.allow(3)
        settler.settle_some()
        assert at.group_ids() == set()
        at.restart()
        at.hello()
        assert [lease.group_id for lease in at.ask(2)] == ["train-000004"]


def test_no_trainer_can_start_before_what_has_left(tmp_path: Path) -> None:
    with bench(tmp_path, make_config(**settling("drop"))) as at:
        at.start()
        take_steps(at, 1, 5)
        (answer,) = at.send("trainer", "trainer", at.trainer_hello_message(2))
        assert isinstance(answer, Refuse)
        assert "up to step 3 has left the journal (hub.keep_trained); put a sound checkpoint" in answer.detail
        assert at.trainer_hello(3) == 1
        assert sorted(at.trained_by_step()) == []
        assert at.ledger.pending == 4


def test_a_checkpoint_the_ledger_has_not_reached_is_refused(tmp_path: Path) -> None:
    with bench(tmp_path, make_config(**settling("drop"))) as at:
        at.start()
        take_steps(at, 1, 2)
        assert at.batch(3, settled=3) is None
        assert at.hub.refused == {"unexpected": 1}


def test_rounds_on_the_way_leave_too_and_keep_their_figures(tmp_path: Path) -> None:
    evaluation: dict[str, object] = {"questions": 2, "every_steps": 1, "questions_during": 1}
    with bench(tmp_path, make_config(**settling("drop", evaluation=evaluation))) as at:
        at.start()
        for step in range(1, 5):
            for lease in at.ask(4 if step == 1 else 3):
                at.play(lease, version=step - 1)
            at.train_step(step, settled=max(0, step - 2))
        rows = at.journal.rows(
            "SELECT round, COUNT(*) FROM groups WHERE purpose = 'eval' GROUP BY round ORDER BY round"
        )
        assert rows == [("before", 2), ("step-3", 1), ("step-4", 1)]
        assert [record.name for record in at.rounds] == ["before", "step-1", "step-2", "step-3"]
        assert at.ledger.evaluation == 5


def test_the_journal_stops_growing(tmp_path: Path) -> None:
    """Over 30 steps with what is dropped, less than a tenth of what the same steps add without."""
    growth = {}
    for keep in ("all", "drop"):
        folder = tmp_path / keep
        folder.mkdir()
        sections = settling(keep, learner={"group_size": 16}, run={"steps": 60})
        with bench(folder, make_config(**sections)) as at:
            at.start()
            sizes = []
            for first, last in ((1, 15), (16, 45)):
                for step in range(first, last + 1):
                    for lease in at.ask(16):
                        at.play(lease, version=step - 1)
                    at.train_step(step, settled=max(0, step - 2))
                sizes.append(
                    at.journal.number("SELECT page_count * page_size FROM pragma_page_count, pragma_page_size")
                )
            growth[keep] = sizes[1] - sizes[0]
    assert growth["drop"] < growth["all"] / 10


def test_a_full_disk_while_archiving_leaves_everything_in_the_journal(tmp_path: Path) -> None:
    with bench(tmp_path, make_config(**settling("all"))) as at:
        at.start()
        take_steps(at, 1, 4)
        at.archive.mkdir()  # nothing can be written there
        settler = Settler(at.journal, archive=at.archive)
        settler.allow(3)
        with pytest.raises(sqlite3.OperationalError), at.journal.transaction():
            settler.settle_some()
        at.archive.rmdir()
        assert (at.ledger.settled, len(at.states())) == (0, 8)


def test_dropping_needs_a_checkpoint_to_fall_back_to() -> None:
    with pytest.raises(ValidationError, match="needs a checkpoint to fall back to; set learner"):
        make_config(hub={"keep_trained": "drop"}, learner={"groups_per_step": 1, "keep_checkpoints": 1})


def test_a_step_reported_twice_after_its_batch_left_changes_nothing(tmp_path: Path) -> None:
    with bench(tmp_path, make_config(**settling("drop"))) as at:
        at.start()
        take_steps(at, 1, 4)
        before = at.ledger
        at.send("trainer", "trainer", StepDone(lineage=0, step=1, trained=(), filtered=()))
        assert at.ledger == before
