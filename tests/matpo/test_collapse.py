"""The collapse watch on made-up figures, and what rollbacks leave of the learning rate."""

from __future__ import annotations

from pathlib import Path

import pytest

from matpo.collapse import (
    FIRST_STEPS,
    Alarm,
    CollapseWatch,
    Vitals,
    append_rollback,
    read_rollbacks,
    rollbacks_before,
    slowed,
    watch_from,
)
from matpo.config import Collapse
from tests.learner.trainer.test_step import config_with

LIMITS = Collapse(signs=2, patience_steps=2)


def vitals(
    step: int, *, kl: float | None = 0.01, entropy: float | None = 1.0, cut: float = 0.1, cosine: float | None = 0.0
) -> Vitals:
    return Vitals(step=step, mismatch_kl=kl, entropy=entropy, truncated=cut, gradient_cosine=cosine)


def watched(limits: Collapse = LIMITS) -> CollapseWatch:
    """A watch that knows what is normal."""
    return watch_from(limits, (vitals(step) for step in range(1, FIRST_STEPS + 1)))


def test_two_signs_together_for_two_steps_raise_the_alarm() -> None:
    watch = watched()
    assert watch.see(vitals(11, kl=0.2, entropy=0.1)) is None
    alarm = watch.see(vitals(12, kl=0.3, entropy=0.1))
    assert alarm is not None and (alarm.step, alarm.since_step) == (12, 11)
    assert alarm.signs == ("mismatch KL 0.3 is above 0.1 nats per token", "entropy went from 1 to 0.1 nats")


def test_one_sign_however_long_raises_none() -> None:
    watch = watched()
    assert [watch.see(vitals(step, kl=9.0)) for step in range(11, 20)] == [None] * 9


def test_a_sound_step_between_begins_the_count_again() -> None:
    watch = watched()
    ill = {"kl": 0.2, "entropy": 0.1}
    assert watch.see(vitals(11, **ill)) is None
    assert watch.see(vitals(12)) is None
    assert watch.see(vitals(13, **ill)) is None
    assert watch.see(vitals(14, **ill)) is not None


def test_after_an_alarm_counting_begins_again() -> None:
    watch = watched()
    seen = [watch.see(vitals(step, kl=0.2, entropy=0.1)) is not None for step in range(11, 15)]
    assert seen == [False, True, False, True]


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (vitals(11, kl=0.2), "mismatch KL"),
        (vitals(11, cosine=0.9), "the same way"),
        (vitals(11, entropy=0.19), "entropy went from 1 to 0.19"),
        (vitals(11, entropy=5.1), "entropy went from 1 to 5.1"),
        (vitals(11, cut=0.36), "36% of trajectories are cut short by a limit, 10% were"),
    ],
    ids=["mismatch", "cosine", "entropy falls", "entropy rises", "truncation"],
)
def test_each_figure_is_a_sign_beyond_its_limit(now: Vitals, words: str) -> None:
    (sign,) = watched().signs(now)
    assert words in sign


def test_within_the_limits_and_without_figures_there_is_no_sign() -> None:
    assert watched().signs(vitals(11, kl=0.1, entropy=0.2, cut=0.35, cosine=0.7)) == []
    assert watched().signs(vitals(11, kl=None, entropy=None, cosine=None)) == []


def test_what_is_normal_is_known_only_after_the_first_steps() -> None:
    watch = watch_from(LIMITS, [vitals(1)])
    assert watch.signs(vitals(2, entropy=0.01, cut=1.0)) == []
    assert len(watch.signs(vitals(2, kl=1.0, cosine=1.0))) == 2


def test_switched_off_it_only_names_signs() -> None:
    watch = watched(Collapse(action="off", signs=1, patience_steps=1))
    assert watch.signs(vitals(11, kl=9.0)) != []
    assert watch.see(vitals(11, kl=9.0)) is None


def test_a_steps_rate_is_lowered_once_for_every_rollback_before_it_was_taken(tmp_path: Path) -> None:
    path = tmp_path / "rollbacks.jsonl"
    assert read_rollbacks(path) == ()
    append_rollback(path, Alarm(step=110, since_step=108, signs=("a",)), to_step=100)
    append_rollback(path, Alarm(step=70, since_step=68, signs=("b",)), to_step=50)
    rollbacks = read_rollbacks(path)
    assert [one.to_step for one in rollbacks] == [100, 50]
    # Step 60 was taken again after both, step 50 is from before the first.
    assert [rollbacks_before(rollbacks, step) for step in (50, 60, 120)] == [0, 2, 2]
    assert [rollbacks_before(rollbacks[:1], step) for step in (60, 100, 101)] == [0, 0, 1]


def test_a_rollback_halves_the_rate() -> None:
    config = config_with(lr=1e-3)
    assert [slowed(config, count).learner.lr for count in (0, 1, 2)] == pytest.approx([1e-3, 5e-4, 2.5e-4])
