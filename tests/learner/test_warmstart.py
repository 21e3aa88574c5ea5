"""The demonstrations of the agent that plans and searches by itself."""

from __future__ import annotations

import random

from learner.warmstart import vocabulary
from learner.warmstart.demos import Demonstrator, Habits, SearchNoise
from learner.warmstart.fit import Example
from matpo.datasets.world import Question, questions

CAREFUL = Habits(
    stop_after_one_of_two=0.0,
    stop_after_one_of_three=0.0,
    stop_after_two_of_three=0.0,
    vague_subtask=0.0,
    ask_twice=0.0,
    partial_query=0.0,
)
CLEAN = SearchNoise(replace=0.0)


def two_hops() -> Question:
    return next(one for seed in range(50) for one in questions(seed, 16) if one.hops == 2)


def said(example: Example) -> list[str]:
    """What the agent itself says, message by message."""
    tokenizer = vocabulary.make_tokenizer()
    mine = [token for token, learn in zip(example.tokens, example.learn, strict=True) if learn]
    text = str(tokenizer.decode(mine))
    return [part.strip() for part in text.split(vocabulary.END) if part]


def test_the_agent_alone_writes_down_the_fact_it_read_before_it_goes_on() -> None:
    question = two_hops()
    first, second = question.chain
    example = Demonstrator(vocabulary.make_tokenizer(), CAREFUL, CLEAN).show_alone(question, random.Random(0))
    search, then, answer = said(example)
    assert search == f"{vocabulary.SEARCH_CALL} {first.key} {vocabulary.CALL_END}"
    assert then == f"{first.text} {vocabulary.SEARCH_CALL} {second.key} {vocabulary.CALL_END}"
    assert answer == f"{second.text} {vocabulary.BOX} {question.answer} {vocabulary.BOX_END}"


def test_the_agent_alone_has_the_planners_habit_of_stopping_early() -> None:
    question = two_hops()
    hasty = Habits(stop_after_one_of_two=1.0, vague_subtask=0.0, ask_twice=0.0, partial_query=0.0)
    example = Demonstrator(vocabulary.make_tokenizer(), hasty, CLEAN).show_alone(question, random.Random(0))
    _, answer = said(example)
    assert answer == f"{question.chain[0].text} {vocabulary.BOX} {question.chain[0].object} {vocabulary.BOX_END}"
