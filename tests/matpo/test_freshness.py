"""How far data may lag, in numbers worked out by hand."""

from __future__ import annotations

import pytest

from matpo.freshness import admissible, distance, forecast
from protocols.records import version_of


@pytest.mark.parametrize(
    ("version", "step", "eta", "in_flight", "expected"),
    [
        (0, 0, 2, 0, 24),  # three steps of eight trees
        (0, 0, 2, 24, 0),
        (0, 0, 0, 0, 8),  # synchronous: one step's data at a time
        (0, 0, 0, 7, 1),
        (3, 3, 1, 10, 6),
        (2, 3, 1, 0, 8),  # step 3 is trained but its weights are not out yet
        (0, 0, 2, 30, 0),  # a resumed run may hold more than the bound; it never goes negative
    ],
)
def test_admission_keeps_the_next_eta_plus_one_steps_in_flight(
    version: int, step: int, eta: int, in_flight: int, expected: int
) -> None:
    room = admissible(version=version, step=step, steps=100, eta=eta, trees_per_step=8, in_flight=in_flight)
    assert room == expected


def test_a_run_admits_no_more_than_its_last_steps_need() -> None:
    room = [admissible(version=s, step=s, steps=10, eta=2, trees_per_step=8, in_flight=0) for s in (6, 8, 9, 10)]
    assert room == [24, 16, 8, 0]


def test_distance_counts_optimizer_steps() -> None:
    assert distance(version=version_of(lineage=0, step=3), current=version_of(lineage=0, step=7)) == 4


def test_a_new_lineage_adds_nothing_to_the_distance() -> None:
    assert distance(version=version_of(lineage=0, step=19), current=version_of(lineage=1, step=21)) == 2


def test_weights_of_an_abandoned_lineage_may_be_ahead() -> None:
    assert distance(version=version_of(lineage=0, step=19), current=version_of(lineage=1, step=12)) == 7


@pytest.mark.parametrize(("in_flight", "needed"), [(128, 4), (64, 3), (0, 1), (256, 6)])
def test_forecast_follows_the_rule_of_thumb(in_flight: int, needed: int) -> None:
    assert forecast(in_flight=in_flight, trees_per_step=128, eta=2).eta_needed == needed  # 1 + 2.5 x / 128, up


def test_forecast_names_what_would_help() -> None:
    tight = forecast(in_flight=128, trees_per_step=128, eta=2)
    assert not tight.busy and "want 4; raise freshness.eta, or lower actor.concurrency to 51 in all" in tight.advice
    assert forecast(in_flight=128, trees_per_step=128, eta=4).busy
