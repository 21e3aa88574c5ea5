"""The length-bias audit: hand-computed distances, alarms where slow episodes are dropped, none for chance."""

from __future__ import annotations

import numpy as np
import pytest

from matpo.length_bias import BiasAudit, Finished, audit, critical_distance, distance


def episodes(trained: list[float], dropped: list[float]) -> list[Finished]:
    return [
        Finished(trained=kept, seconds=seconds, sampled_tokens=10, reward_of_task=None, hops=None)
        for kept, values in ((True, trained), (False, dropped))
        for seconds in values
    ]


def seconds_of(found: BiasAudit) -> tuple[float, bool]:
    first = found.divergences[0]
    assert first.figure == "seconds"
    return first.distance, first.alarming


def test_the_distance_is_the_largest_gap_between_the_cumulative_shares() -> None:
    one = np.array([1, 2, 3, 4], dtype=np.float32)
    # At 3 three quarters of the one and none of the other.
    assert distance(one, np.array([3.5, 5, 6, 7], dtype=np.float32)) == 0.75
    assert distance(one, one) == 0.0
    assert distance(one, one + 10) == 1.0


def test_the_critical_distance_is_that_of_the_textbook() -> None:
    # c(0.001) = sqrt(-ln(0.0005) / 2) = 1.9495; for 100 and 100: times sqrt(200 / 10000).
    assert critical_distance(100, 100) == pytest.approx(1.9495 * 0.141421, rel=1e-4)


def test_dropping_the_slowest_tenth_is_alarming() -> None:
    slowest = [float(second) for second in range(270, 300)]
    found = audit(episodes([float(second) for second in range(270)], slowest))
    # All 270 trained are below all 30 dropped: 1.0, times the dropped tenth.
    assert seconds_of(found) == (0.1, True)
    assert (found.generated, found.trained) == (300, 270)
    assert found.alarms == ("seconds: 134 on average in what is trained on, 150 in what is played (distance 0.10)",)


def test_dropping_episodes_whatever_their_length_is_not() -> None:
    every = [float(second) for second in range(300)]
    found = audit(episodes([s for s in every if s % 10], [s for s in every if not s % 10]))
    assert not seconds_of(found)[1]
    assert found.alarms == ()


def test_a_handful_of_slow_ones_may_be_chance() -> None:
    shift, alarming = seconds_of(audit(episodes([1.0, 2.0, 3.0, 4.0], [9.0, 8.0])))
    assert (round(shift, 4), alarming) == (0.3333, False)


def test_a_few_in_many_do_not_shift_what_is_trained() -> None:
    found = audit(episodes([float(second) for second in range(1000)], [2000.0] * 20))
    assert seconds_of(found) == (0.0196, False)


def test_hard_tasks_that_are_dropped_show_by_reward_and_hops() -> None:
    kept = [Finished(True, 1.0, 10, 0.75, 1.0)] * 200
    gone = [Finished(False, 1.0, 10, 0.25, 3.0)] * 50
    found = {d.figure: d for d in audit([*kept, *gone]).divergences}
    assert [name for name, d in found.items() if d.alarming] == ["reward_of_task", "hops"]
    assert (found["hops"].trained_mean, found["hops"].generated_mean) == (1.0, 1.4)
    assert found["reward_of_task"].distance == 0.2
    assert found["hops"].generated_quantiles == (1.0, 1.0, 3.0, 3.0)


def test_where_nothing_was_dropped_there_is_nothing_to_compare() -> None:
    found = audit(episodes([1.0, 2.0], []))
    assert (found.divergences, found.alarms) == ((), ())
