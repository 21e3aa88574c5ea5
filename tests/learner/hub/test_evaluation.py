"""Evaluation rounds: when they start, what they say, and that the training ledger does not see them."""

from __future__ import annotations

from pathlib import Path

from protocols.messages import Lease
from protocols.records import version_of
from tests.learner.hub.bench import Bench, bench, make_config, make_tree

CONFIG = make_config(evaluation={"questions": 4, "every_steps": 1, "questions_during": 3}, run={"steps": 3})


def evaluate(at: Bench, rewards: list[float | None], *, version: int, purpose: str = "eval") -> list[Lease]:
    """Lease and play so many evaluation episodes."""
    leases = at.ask(len(rewards))
    for lease, reward in zip(leases, rewards, strict=True):
        assert lease.purpose == purpose
        at.upload(make_tree(lease, 0, version=version, reward=reward))
    return leases


def train(at: Bench, step: int, *, lineage: int = 0) -> None:
    for lease in at.ask(4):
        at.play(lease, version=version_of(lineage=lineage, step=step - 1))
    at.train_step(step, lineage=lineage)


def test_the_first_round_comes_before_any_training_lease(tmp_path: Path) -> None:
    with bench(tmp_path, CONFIG) as at:
        at.start()
        leases = at.ask(6)
        assert [lease.purpose for lease in leases] == ["eval"] * 4 + ["train"]
        assert [lease.task.question for lease in leases[:4]] == [f"held-out-{n}" for n in range(4)]
        assert [lease.episodes for lease in leases] == [(0,)] * 4 + [(0, 1)]


def test_a_round_reports_accuracy_by_hops_and_template(tmp_path: Path) -> None:
    with bench(tmp_path, CONFIG) as at:
        at.start()
        evaluate(at, [1.0, 0.0, 1.0, 1.0], version=0)
        (record,) = at.rounds
        assert (record.name, record.label, record.step, record.questions, record.scored) == (
            "before",
            "before",
            0,
            4,
            4,
        )
        assert record.accuracy == 0.75
        assert record.accuracy_by_hops == {"1": 1.0, "2": 0.5}  # hops 1, 2, 1, 2
        assert record.accuracy_by_template == {"t0": 1.0, "t1": 0.0, "t2": 1.0}
        assert (record.format, record.reading, record.sampled_tokens_mean) == (1.0, None, 3.0)


def test_reading_is_the_mean_of_where_it_applies(tmp_path: Path) -> None:
    with bench(tmp_path, CONFIG) as at:
        at.start()
        for lease, reading in zip(at.ask(4), (1.0, None, 0.0, 1.0), strict=True):
            at.upload(make_tree(lease, 0, reading=reading))
        assert at.rounds[0].reading == 0.666667


def test_evaluation_trees_stay_out_of_the_training_ledger(tmp_path: Path) -> None:
    with bench(tmp_path, CONFIG) as at:
        at.start()
        evaluate(at, [1.0] * 4, version=0)
        ledger = at.ledger
        assert (ledger.evaluation, ledger.pending, ledger.tasks) == (4, 0, 0)
        assert at.hub.leases.in_flight() == 0


def test_a_failed_evaluation_episode_is_played_again_and_at_last_left_unscored(tmp_path: Path) -> None:
    config = make_config(evaluation={"questions": 1}, hub={"max_attempts": 2})
    with bench(tmp_path, config) as at:
        at.start()
        evaluate(at, [None], version=0)
        assert at.rounds == []
        evaluate(at, [None], version=0)
        assert (at.rounds[0].questions, at.rounds[0].scored, at.rounds[0].accuracy) == (1, 0, None)


def test_rounds_during_training_move_through_the_questions(tmp_path: Path) -> None:
    with bench(tmp_path, CONFIG, evaluation=5) as at:
        at.start()
        evaluate(at, [1.0] * 4, version=0)
        train(at, 1)
        first = evaluate(at, [1.0] * 3, version=1)
        train(at, 2)
        second = evaluate(at, [1.0] * 3, version=2)
        asked = [[lease.task.question.removeprefix("held-out-") for lease in leases] for leases in (first, second)]
        assert asked == [["0", "1", "2"], ["3", "4", "0"]]
        assert [record.name for record in at.rounds] == ["before", "step-1", "step-2"]


def test_the_run_is_complete_when_the_last_round_is_in(tmp_path: Path) -> None:
    with bench(tmp_path, make_config(evaluation={"questions": 2}, run={"steps": 1})) as at:
        at.start()
        evaluate(at, [0.0, 0.0], version=0)
        train(at, 1)
        assert not at.hub.complete
        leases = evaluate(at, [1.0, 1.0], version=1)
        assert {lease.min_version for lease in leases} == {1}
        assert at.hub.complete
        assert [(record.label, record.accuracy) for record in at.rounds] == [("before", 0.0), ("after", 1.0)]


def test_a_round_due_for_later_weights_waits_for_a_resumed_trainer(tmp_path: Path) -> None:
    with bench(tmp_path, make_config(evaluation={"questions": 2}, run={"steps": 1})) as at:
        at.start()
        evaluate(at, [0.0, 0.0], version=0)
        train(at, 1)
        at.trainer_hello(0)  # killed before its checkpoint
        at.publish(version_of(lineage=1, step=0))
        assert at.ask(2) == at.ask(0) == []
        at.train_step(1, lineage=1)
        leases = evaluate(at, [1.0, 1.0], version=version_of(lineage=1, step=1))
        assert {lease.min_version for lease in leases} == {version_of(lineage=1, step=1)}
        assert at.hub.complete


def test_what_no_step_will_use_is_not_played_any_more(tmp_path: Path) -> None:
    config = make_config(run={"steps": 1}, learner={"groups_per_step": 1}, hub={"max_attempts": 9})
    with bench(tmp_path, config) as at:
        at.start()
        (first,) = at.ask(2)
        at.upload(make_tree(first, 0, reward=None, status="tool_failure"))
        at.upload(make_tree(first, 1))
        (again,) = at.ask(1)
        at.upload(make_tree(again, 0))
        with at.journal.transaction():
            at.hub.leases.open_group(at.train[0], purpose="train", round_name=None, episodes=2, at=0.0)
        at.train_step(1)
        assert at.ask(2) == []
        assert at.hub.complete


def test_without_questions_the_run_ends_with_its_last_step(tmp_path: Path) -> None:
    with bench(tmp_path, make_config(run={"steps": 1})) as at:
        at.start()
        train(at, 1)
        assert at.hub.complete


def test_a_run_of_no_steps_only_evaluates(tmp_path: Path) -> None:
    with bench(tmp_path, make_config(evaluation={"questions": 1}, run={"steps": 0})) as at:
        at.start()
        assert not at.hub.complete
        evaluate(at, [1.0], version=0)
        assert at.hub.complete
