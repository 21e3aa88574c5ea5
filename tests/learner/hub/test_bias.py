"""The length-bias audit over a journal: slow episodes that never reach training are noticed, by status and doctor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from learner.hub.bias import audit_journal
from learner.hub.core import Hub
from learner.hub.status import StatusReporter
from matpo.waits import WaitBook
from tests.learner.hub.bench import Bench, bench, make_config, make_tree

CONFIG = make_config(run={"steps": 10}, learner={"groups_per_step": 1, "group_size": 16}, hub={"max_attempts": 1})


def play(at: Bench, steps: int, *, slow_fail: bool) -> None:
    """Every fourth episode takes 60 s instead of 2; if it fails, it is not trained on."""
    for step in range(1, steps + 1):
        for lease in at.ask(16):
            for episode in lease.episodes:
                slow = episode % 4 == 3
                fails = slow and slow_fail
                tree = make_tree(
                    lease, episode, version=step - 1, reward=None if fails else 1.0,
                    status="tool_failure" if fails else "done",
                )  # fmt: skip
                at.upload(replace(tree, seconds=60.0 if slow else 2.0))
        at.train_step(step)


def reporter(hub: Hub, at: Bench) -> StatusReporter:
    return StatusReporter(hub, at.journal, 10, WaitBook("hub"), (), 0.0, 0, 0)


def test_slow_episodes_that_fail_are_missing_from_training(tmp_path: Path) -> None:
    with bench(tmp_path, CONFIG) as at:
        at.start()
        play(at, 4, slow_fail=True)
        found = audit_journal(at.journal)
        assert (found.generated, found.trained) == (64, 48)
        (alarm,) = found.alarms
        # 48 of 2 s; all together (48 · 2 + 16 · 60) / 64 = 16.5 s.
        assert alarm.startswith("seconds: 2 on average in what is trained on, 16.5 in what is played (distance 0.25)")
        assert reporter(at.hub, at).read(at.now_s).bias == found


def test_slow_episodes_that_are_trained_on_are_no_bias(tmp_path: Path) -> None:
    with bench(tmp_path, CONFIG) as at:
        at.start()
        play(at, 2, slow_fail=False)
        assert audit_journal(at.journal).alarms == ()


def test_groups_that_are_not_done_with_do_not_count(tmp_path: Path) -> None:
    with bench(tmp_path, CONFIG) as at:
        at.start()
        (lease,) = at.ask(16)
        at.upload(make_tree(lease, 0, reward=None, status="tool_failure"))
        assert audit_journal(at.journal).generated == 0
