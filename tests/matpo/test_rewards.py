"""Rewards, part by part, with numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pydantic import JsonValue

from matpo.config import Rewards
from matpo.rewards.answer import boxed, cover, exact_match, extract_answer, normalise, token_f1, volunteer
from matpo.rewards.call_format import format_score
from matpo.rewards.cost import critical_steps, spawned
from matpo.rewards.measure import Measure
from matpo.rewards.performance import Performance, Play
from matpo.rewards.reading import reading
from matpo.rewards.score import PARTS, Scorer
from protocols.records import Outcome, Status, Task, ToolSpan


def span(server: str = "web", outcome: Outcome = "ok") -> ToolSpan:
    return ToolSpan(trajectory=0, turn=1, call_id="0.1.0", server=server, tool="search", outcome=outcome,
                    started_s=0.0, seconds=0.1, result_bytes=1)  # fmt: skip


def agent(
    final: str | None = "Ann",
    *calls: ToolSpan,
    status: Status = "done",
    subtask: str | None = None,
    results: tuple[str, ...] = (),
) -> Performance:
    return Performance("role", status, final, subtask, results, calls)


def called(final: str, *calls: ToolSpan) -> Performance:
    """An agent that the first one called."""
    return replace(agent(final, *calls, subtask="do it"), parent=(0, 1))


def play(*agents: Performance, **metadata: JsonValue) -> Play:
    return Play(Task.make("Who?", ("Ann", "Anna"), metadata), agents)


async def no_sandbox(program: str) -> str | None:
    raise AssertionError("nothing here runs code")


async def score(play: Play, rewards: Rewards) -> dict[str, float | None]:
    """The reward of an episode whose root answers."""
    verdict = await Measure(rewards)(play.task, (play.agents[0].final or "",), no_sandbox)
    return await Scorer(rewards)(play, verdict.score)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{4}", "4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} or \boxed{ 2 }", "2"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{a\boxed{b}}", "b"),
        ("boxed{4}", None),
        (r"\boxed{", None),
    ],
)
def test_the_last_closed_box_is_the_answer_braces_inside_included(text: str, answer: str | None) -> None:
    assert boxed(text) == answer


def test_without_a_box_the_answer_tag_counts_and_without_that_the_whole_message() -> None:
    assert extract_answer("<answer>a</answer> x <answer> b </answer>") == "b"
    assert extract_answer(" Ann \n") == "Ann"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("The Answer.", "answer"),
        ("a  cat,\nan owl", "cat owl"),
        ("U.S.", "us"),
        ("The", "the"),
        ("--", "--"),
        ("Theo", "theo"),
    ],
)
def test_normalising_drops_case_articles_punctuation_and_spaces(given: str, wanted: str) -> None:
    assert normalise(given) == wanted


def test_any_reference_may_match_and_an_empty_answer_never_does() -> None:
    assert exact_match("the  ANNA!", ["Ann", "Anna"]) == 1.0
    assert exact_match("Ann B", ["Ann"]) == 0.0
    assert exact_match("", [""]) == 0.0


def test_f1_is_the_harmonic_mean_over_shared_words_of_the_best_reference() -> None:
    assert token_f1("big red car", ["the red car"]) == pytest.approx(2 * 2 / (3 + 2))  # "the" is dropped
    assert token_f1("red red", ["red"]) == pytest.approx(2 / 3)
    assert token_f1("blue", ["red", "blue"]) == 1.0
    assert token_f1("", ["red"]) == 0.0 and token_f1("red", []) == 0.0


def test_format_is_the_share_of_calls_that_were_not_refused_whatever_the_tool_answered() -> None:
    assert format_score([]) == 1.0
    assert format_score([span(), span("", "model_error"), span("web", "model_error"), span("agent")]) == 0.75


async def test_the_total_is_nine_tenths_answer_and_one_tenth_format_half_planner_half_workers() -> None:
    rewards = await score(
        play(agent(r"\boxed{ann}", span(), span("", "model_error")), called("x", span("", "model_error")), called("y")),
        Rewards(),
    )
    assert rewards["format_planner"] == 0.5 and rewards["format_worker"] == 0.5  # (0 + 1) / 2
    assert rewards["answer"] == 1.0 and rewards["format"] == 0.5
    assert rewards["total"] == pytest.approx(0.95)
    assert tuple(rewards) == PARTS


async def test_without_workers_the_planner_alone_is_the_format_score() -> None:
    rewards = await score(play(agent("wrong")), Rewards())
    assert rewards["format_worker"] is None and rewards["total"] == pytest.approx(0.1)


async def test_a_box_in_a_workers_report_is_not_the_answer() -> None:
    assert (await score(play(agent("I do not know"), called(r"\boxed{Ann}")), Rewards()))["answer"] == 0.0


async def test_an_agent_that_ran_out_of_turns_is_wrong_not_unscored() -> None:
    rewards = await score(play(agent(None, status="turn_limit")), Rewards())
    assert rewards["answer"] == 0.0 and rewards["total"] == pytest.approx(0.1)


async def test_format_may_count_only_where_the_answer_is_right() -> None:
    gated = Rewards(format_only_if_correct=True)
    assert (await score(play(agent("wrong")), gated))["total"] == 0.0
    assert (await score(play(agent("Ann")), gated))["total"] == pytest.approx(1.0)


async def test_f1_gives_partial_credit() -> None:
    assert (await score(play(agent("Ann Lee")), Rewards(answer="f1")))["total"] == pytest.approx(0.9 * 2 / 3 + 0.1)


@pytest.mark.parametrize(
    "broken",
    [
        play(agent(status="engine_failure")),
        play(agent(), agent(status="tool_failure")),
        play(agent("Ann", span(outcome="infrastructure"))),
        play(agent(status="cancelled")),
    ],
)
async def test_infrastructure_trouble_anywhere_leaves_every_part_unscored(broken: Play) -> None:
    assert await score(broken, Rewards()) == dict.fromkeys(PARTS)


def step(turns: int, parent: tuple[int, int] | None = None, *, subtask: str | None = "do it") -> Performance:
    return replace(agent(subtask=None if parent is None else subtask), parent=parent, turns=turns)


def test_the_critical_path_counts_only_the_longest_of_those_called_at_once() -> None:
    # Two workers from turn 1 (2 and 5 turns; the second called one of 3 itself), one from turn 3 (4 turns).
    tree = play(step(3), step(2, (0, 1)), step(5, (0, 1)), step(3, (2, 1)), step(4, (0, 3)))
    assert critical_steps(tree) == 3 + (5 + 3) + 4
    assert spawned(tree) == 4


def test_agents_that_begin_together_cost_the_longest_of_them_and_an_act_adds_to_the_one_it_follows() -> None:
    tree = play(step(1), step(4), step(2, (0, 1), subtask=None))
    assert (critical_steps(tree), spawned(tree)) == (4, 0)
    assert critical_steps(play(step(1), step(4), step(5, (0, 1), subtask=None))) == 6


async def test_costs_are_weighted_parts() -> None:
    rewards = Rewards(step_weight=-0.01, spawn_weight=-0.1)
    parts = await score(play(replace(agent("Ann"), turns=3), called("x")), rewards)
    assert (parts["steps"], parts["spawned"]) == (4.0, 1.0)
    assert parts["total"] == pytest.approx(1.0 - 0.04 - 0.1)


def test_agents_that_divide_the_work_cover_what_either_of_them_names() -> None:
    assert cover(["Ann", "the Bob."], ["Ann", "Bob"]) == 1.0
    assert cover(["Ann", "Ann"], ["Ann", "Bob"]) == 0.5
    assert cover(["", "Zoe"], ["Ann", "Bob"]) == 0.0


def test_where_one_is_to_answer_two_right_answers_are_as_bad_as_none() -> None:
    assert volunteer(["Ann", "no"], ["Ann", "Anna"]) == 1.0
    assert volunteer(["Ann", "Anna"], ["Ann", "Anna"]) == 0.0
    assert volunteer(["no", ""], ["Ann"]) == 0.0


async def test_several_answers_at_once_score_their_mean_or_what_they_cover() -> None:
    task = Task.make("Who?", ("Ann", "Bob"))
    both = ("\\boxed{Ann}", "\\boxed{Zoe}")
    assert (await Measure(Rewards())(task, both, no_sandbox)).score == 0.5
    verdict = await Measure(Rewards(answer="cover"))(task, ("Ann", "\\boxed{Bob}"), no_sandbox)
    assert (verdict.score, verdict.passed) == (1.0, True)


CHAIN: dict[str, JsonValue] = {"chain": ["Ugo employer Pallas", "Pallas founder Klara"]}
SECOND = "[1] Ann employer Acme .\n[2] Ugo employer Pallas .\n[3] Ugo mentor Zoe ."


def worker(report: str, results: str = SECOND, subtask: str = "Ugo employer") -> Performance:
    return agent(report, subtask=subtask, results=(results,))


def test_reading_is_the_share_of_workers_that_report_a_fact_found_below_the_first_hit() -> None:
    assert reading(play(agent(), worker("Ugo employer Pallas"), **CHAIN)) == 1.0
    assert reading(play(agent(), worker("Ugo employer Pallas"), worker("Ann employer Acme"), **CHAIN)) == 0.5


def test_reading_is_not_measured_where_it_could_not_be_seen() -> None:
    first = "[1] Ugo employer Pallas .\n[2] Ugo mentor Zoe ."
    assert reading(play(agent(), worker("Ugo employer Pallas", first), **CHAIN)) is None
    assert reading(play(agent(), worker("not found", "no results"), **CHAIN)) is None
    assert reading(play(agent(), worker("Ugo mentor Zoe", subtask="Ugo mentor"), **CHAIN)) is None
    assert reading(play(agent(), worker("Ugo employer Pallas"))) is None


@pytest.mark.parametrize(
    ("one", "fact", "form"),
    [
        (worker("Ugo employer Pallas"), 1.0, 1.0),
        (worker("Ugo employer Acme"), 0.0, 1.0),
        (worker("Ugo mentor Zoe", subtask="Ugo mentor"), None, 1.0),
        (replace(worker("Ugo employer Pallas"), status="tool_failure"), None, None),
        (agent("Ann"), None, None),
    ],
)
async def test_a_workers_own_act_may_earn_what_it_reports_or_how_it_calls(
    one: Performance, fact: float | None, form: float | None
) -> None:
    episode = play(agent(), one, **CHAIN)
    assert await Scorer(Rewards(workers="fact")).earned(episode, 1) == fact
    assert await Scorer(Rewards(workers="format")).earned(episode, 1) == form
