"""What a step's episodes say about each role, worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from matpo.diagnostics import cut_short, free_riding, reward_explained, role_plays
from protocols.records import EpisodeGroup, EpisodeTree, StopReason, Trajectory, Turn, WeightStamp
from tests.matpo.trees import group_of, trajectory, tree


def said(*tokens: int, role: str = "worker", stop_reason: StopReason = "stop", version: int = 0) -> Trajectory:
    """A trajectory that read one token and then sampled these."""
    made = trajectory("." + "x" * len(tokens), role=role, parent=None if role == "planner" else (0, 0))
    spans = (
        Turn(kind="prompt", start=0, stop=1),
        Turn(kind="sampled", start=1, stop=1 + len(tokens), stop_reason=stop_reason),
    )
    return replace(
        made,
        tokens=np.array([0, *tokens], np.int32),
        turns=spans,
        versions=np.full(len(tokens), version, np.int32),
    )


def group(*trees: tuple[float | None, list[Trajectory]]) -> EpisodeGroup:
    """Trees of one task, each of a reward and its workers."""
    return group_of(
        [tree(reward, said(1, role="planner"), *workers, name=f"t{n}") for n, (reward, workers) in enumerate(trees)]
    )


def test_a_worker_whose_report_never_changes_the_reward_rides_free() -> None:
    groups = [group((1.0, [said(5)]), (1.0, [said(6)]), (1.0, []))]
    assert free_riding(groups, "worker") == 1.0


def test_a_worker_whose_report_decides_does_not() -> None:
    groups = [group((1.0, [said(5)]), (1.0, [said(5)]), (0.0, [said(6)]), (0.0, [said(6)]))]
    assert free_riding(groups, "worker") == 0.0
    assert reward_explained(groups, "worker") == 1.0


def test_free_riding_compares_a_tree_with_those_of_another_report_only() -> None:
    # The first tree agrees with the third, the second does not, and the third disagrees with the second.
    groups = [group((1.0, [said(5)]), (0.0, [said(5)]), (1.0, [said(6)])), group((0.0, [said(5)]), (0.0, [said(5)]))]
    assert free_riding(groups, "worker") == pytest.approx(1 / 3)


def test_without_two_reports_of_a_task_or_a_score_nothing_is_said() -> None:
    assert free_riding([group((1.0, [said(5)]), (0.0, [said(5)]))], "worker") is None
    assert free_riding([group((None, [said(5)]), (0.0, [said(6)]))], "worker") is None


def test_reward_explained_by_reports_that_have_nothing_to_do_with_it() -> None:
    groups = [group((1.0, [said(5)]), (0.0, [said(5)]), (1.0, [said(6)]), (0.0, [said(6)]))]
    # Within reports ½ + ½ over 2 degrees of freedom, in all 1 over 3: 1 − ½ / ⅓.
    assert reward_explained(groups, "worker") == pytest.approx(-0.5)


def test_reward_explained_needs_equal_reports_and_varying_rewards() -> None:
    assert reward_explained([group((1.0, [said(5)]), (0.0, [said(6)]))], "worker") is None
    assert reward_explained([group((1.0, [said(5)]), (1.0, [said(5)]))], "worker") is None


@pytest.mark.parametrize(
    ("one", "cut"),
    [
        (said(5), False),
        (said(5, stop_reason="length"), True),
        (said(5, stop_reason="context"), True),
        (trajectory(".x", status="turn_limit"), True),
        (trajectory(".x", status="engine_failure"), False),
    ],
    ids=["stop", "length", "context", "turns", "failure"],
)
def test_a_trajectory_is_cut_short_by_a_limit_on_tokens_context_or_turns(one: Trajectory, cut: bool) -> None:
    assert cut_short(one) is cut


def played(name: str, *trajectories: Trajectory) -> EpisodeTree:
    versions = sorted({int(version) for one in trajectories for version in one.versions})
    weights = tuple(WeightStamp(version=version, digest="d") for version in versions)
    return replace(tree(1.0, name=name), trajectories=trajectories, weights=weights)


def test_figures_of_every_role_are_over_its_own_trajectories_and_tokens() -> None:
    one = played("a", said(1, 2, role="planner", version=4), said(5, version=3, stop_reason="length"))
    other = played("b", said(1, role="planner", version=1))
    plays = role_plays([group_of([one, other])], current=5)
    assert (plays["planner"].trajectories, plays["worker"].trajectories) == (2, 1)
    assert plays["planner"].staleness_mean == pytest.approx((1 + 1 + 4) / 3)
    assert (plays["planner"].staleness_max, plays["worker"].staleness_max) == (4, 2)
    assert (plays["planner"].truncated, plays["worker"].truncated) == (0.0, 1.0)
    assert (plays["planner"].free_riding, plays["worker"].free_riding) == (None, 1.0)
