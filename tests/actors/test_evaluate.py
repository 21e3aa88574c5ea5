"""The figures of `matpo eval`: means over questions of means over episodes, infrastructure left out."""

from __future__ import annotations

import dataclasses

from actors.evaluate import Line, line_of, lines_by
from protocols.records import EpisodeTree, Task
from tests.actors.trees import small_tree


def played(question: str, *, hops: int, answer: float | None, form: float | None = 1.0) -> EpisodeTree:
    rewards = {"answer": answer, "format": form, "reading": None, "total": answer}
    task = Task.make(question, ("me",), {"hops": hops})
    return dataclasses.replace(small_tree("t"), task=task, rewards=rewards)


def test_a_question_counts_once_however_many_of_its_episodes_were_scored() -> None:
    trees = [
        played("a", hops=1, answer=1.0, form=0.5),
        played("a", hops=1, answer=0.0, form=0.5),
        played("b", hops=1, answer=0.0),
        played("b", hops=1, answer=None, form=None),
    ]
    # a: 1/2, b: 0 of the one that was scored
    assert line_of(trees) == Line(questions=2, answer=0.25, format=0.75, reading=None, unscored=1)


def test_lines_are_split_by_what_the_tasks_say_of_themselves() -> None:
    trees = [played("a", hops=1, answer=1.0), played("b", hops=2, answer=0.0), played("c", hops=2, answer=1.0)]
    assert {hops: line.answer for hops, line in lines_by(trees, "hops").items()} == {"1": 1.0, "2": 0.5}
    assert lines_by(trees, "template") == {}
