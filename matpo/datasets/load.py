"""Tasks of a configured dataset, in an order that depends on nothing but the settings and the seed."""

from __future__ import annotations

import random

from matpo.config import Dataset, JsonlData, WorldData
from matpo.datasets.jsonl import read_jsonl
from matpo.datasets.world import TEMPLATES, Question, collection, make_world, questions
from matpo.errors import UserError
from protocols.records import Task

SEARCH_TOOL = "search"
"""The tool of the world's tasks whose `collection` argument is fixed to the task's own world."""


def load_tasks(dataset: Dataset, *, seed: int) -> list[Task]:
    """The tasks, each once, shuffled with `seed`. Raises `UserError` where the dataset cannot be read."""
    match dataset:
        case JsonlData(path=path, limit=limit):
            tasks = read_jsonl(path, limit=limit)
        case WorldData():
            tasks = _world_tasks(dataset)
    random.Random(f"matpo-tasks-{seed}").shuffle(tasks)
    return tasks


def world_task(question: Question) -> Task:
    """A question of the generated world as a task; its metadata names the chain of facts that proves the answer."""
    return Task.make(
        question.text,
        (question.answer,),
        {
            "world": question.world,
            "template": question.template,
            "hops": question.hops,
            "chain": [fact.text for fact in question.chain],
        },
        {SEARCH_TOOL: {"collection": collection(question.world)}},
    )


def _world_tasks(dataset: WorldData) -> list[Task]:
    """`questions` tasks spread evenly over the worlds, round by round."""
    known = sorted({template.hops for template in TEMPLATES})
    if not set(dataset.hops) <= set(known) or not dataset.hops:
        raise UserError(f"data hops = {list(dataset.hops)}: the world has questions of {known} hops")
    share = sum(template.hops in dataset.hops for template in TEMPLATES) / len(TEMPLATES)
    worlds = min(dataset.worlds, dataset.questions)
    per_world = -(-dataset.questions // worlds)
    seeds = range(dataset.first_seed, dataset.first_seed + worlds)
    if dataset.ask == "facts":
        columns = [_facts(seed, per_world) for seed in seeds]
    else:
        columns = [_unique(seed, dataset.hops, per_world, share) for seed in seeds]
    rounds = [column[row] for row in range(per_world) for column in columns if row < len(column)]
    if len(rounds) < dataset.questions:
        raise UserError(
            f"data asks for {dataset.questions} questions, but {worlds} worlds hold only {len(rounds)} different ones;"
            " raise data.worlds"
        )
    return rounds[: dataset.questions]


def _facts(world: int, count: int) -> list[Task]:
    """Up to `count` facts of a world, to be answered by their objects."""
    facts = [fact.text.split() for fact in make_world(world).facts]
    random.Random(f"matpo-facts-{world}").shuffle(facts)
    return [Task.make(" ".join(fact), (fact[-1],), {"world": world}) for fact in facts[:count]]


def _unique(world: int, hops: tuple[int, ...], count: int, share: float) -> list[Task]:
    """Up to `count` different tasks about one world."""
    draws = len(TEMPLATES) * (2 + round(2 * count / (share * len(TEMPLATES))))
    tasks = (world_task(question) for question in questions(world, draws) if question.hops in hops)
    return list({task.task_id: task for task in tasks}.values())[:count]
