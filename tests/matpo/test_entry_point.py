"""Reward functions of one's own: found by name, checked before the run, their numbers taken as they are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from matpo.errors import UserError
from matpo.rewards.entry_point import MOST_FAILURES, answer_function, play_function
from matpo.rewards.measure import Measure
from matpo.rewards.performance import Performance, Play
from matpo.rewards.score import Scorer
from matpo.rewards_config import Rewards, UserReward
from protocols.records import Task

SOURCE = """
from matpo.rewards.performance import Play
from protocols.records import Task

def longest(task: Task, messages: tuple[str, ...]) -> float | None:
    return float(max(map(len, messages)))

async def slow(task: Task, messages: tuple[str, ...]) -> float | None:
    return None if messages == ("",) else 0.25

def brevity(play: Play) -> float | None:
    return -float(len(play.agents))

def unknown(play: Play) -> float | None:
    return None

def repeated(task: Task, subtask: str, report: str) -> float | None:
    return float(len(subtask + report))

def endless(play: Play) -> float | None:
    return float("inf")

class Mood(Exception):
    pass

def moody(task: Task, messages: tuple[str, ...]) -> float | None:
    if messages != ("good",):
        raise Mood(messages[0])
    return 1.0

NUMBER = 3
"""
TASK = Task.make("Who?", ("Ann",))
PLAY = Play(TASK, (Performance("solver", "done", "Ann", None, (), ()),))


@pytest.fixture(autouse=True)
def own_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A file in the working directory, which is not on the import path of itself."""
    (tmp_path / "own_rewards.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield
    sys.modules.pop("own_rewards", None)


async def no_sandbox(program: str) -> str | None:
    raise AssertionError("nothing here runs code")


async def test_a_function_of_ones_own_may_measure_the_answer_at_once_or_later() -> None:
    longest = Measure(Rewards(answer="own_rewards:longest"))
    assert (await longest(TASK, ("Ann", "Robert"), no_sandbox)).score == 6.0
    slow = Measure(Rewards(answer="own_rewards:slow"))
    assert (await slow(TASK, ("x",), no_sandbox)).score == 0.25
    assert (await slow(TASK, ("",), no_sandbox)).score is None


async def test_parts_of_ones_own_are_weighted_and_one_that_is_not_known_leaves_the_total_open() -> None:
    brevity = UserReward(function="own_rewards:brevity", weight=0.5)
    rewards = await Scorer(Rewards(parts={"brevity": brevity}))(PLAY, 1.0)
    assert rewards["brevity"] == -1.0 and rewards["total"] == pytest.approx(1.0 - 0.5)
    unknown = UserReward(function="own_rewards:unknown", weight=0.5)
    rewards = await Scorer(Rewards(parts={"unknown": unknown}))(PLAY, 1.0)
    assert rewards["answer"] == 1.0 and rewards["total"] is None


async def test_a_number_that_is_none_leaves_the_total_open_and_is_logged_by_name() -> None:
    endless = UserReward(function="own_rewards:endless", weight=1.0)
    with capture_logs() as lines:
        rewards = await Scorer(Rewards(parts={"endless": endless}))(PLAY, 1.0)
    assert (rewards["answer"], rewards["endless"], rewards["total"]) == (1.0, None, None)
    assert lines[0]["function"] == "own_rewards:endless" and lines[0]["reason"].startswith("inf in place of a")


async def test_whatever_a_function_raises_is_a_missing_score_whose_traceback_is_logged_once() -> None:
    moody = answer_function("own_rewards:moody")
    with capture_logs() as lines:
        scores = [await moody(TASK, (message,)) for message in ("bad", "good", "bad", "worse")]
    assert scores == [None, 1.0, None, None]
    assert [(line["failures"], line["exc_info"]) for line in lines] == [(1, True), (2, False), (3, False)]
    assert "Mood: bad (own_rewards.py, line " in lines[0]["reason"]


async def test_a_function_that_always_fails_ends_the_actor_by_name_and_one_that_works_at_times_does_not() -> None:
    moody = answer_function("own_rewards:moody")
    for message in ["bad"] * (MOST_FAILURES - 1) + ["good"] + ["bad"] * (MOST_FAILURES - 1):
        await moody(TASK, (message,))
    with pytest.raises(UserError, match=f"moody' failed {MOST_FAILURES} times in a row, last with Mood: bad"):
        await moody(TASK, ("bad",))


def test_a_module_that_fails_as_it_is_imported_is_the_users_to_correct(tmp_path: Path) -> None:
    (tmp_path / "broken_rewards.py").write_text("x = 1\ny = x / 0\n")
    with pytest.raises(UserError, match=r"fails with ZeroDivisionError: .*\(broken_rewards.py, line 2\); correct it"):
        answer_function("broken_rewards:f")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:f", "start in the folder of nowhere.py"),
        ("own_rewards:absent", "has no function 'absent'"),
        ("own_rewards:NUMBER", "has no function 'NUMBER'"),
        ("own_rewards:brevity", r"is called with \(task, messages\)"),
    ],
)
def test_a_function_that_cannot_serve_is_refused_before_the_run(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        answer_function(name)


def test_a_part_of_the_reward_takes_the_whole_play() -> None:
    with pytest.raises(UserError, match=r"is called with \(play\)"):
        play_function("own_rewards:longest")


async def test_a_workers_act_may_be_scored_by_a_function_of_its_subtask_and_report() -> None:
    worker = Performance("worker", "done", "report", "subtask", (), (), (0, 1))
    scorer = Scorer(Rewards(workers="own_rewards:repeated"))
    assert await scorer.earned(Play(TASK, (*PLAY.agents, worker)), 1) == 13.0
