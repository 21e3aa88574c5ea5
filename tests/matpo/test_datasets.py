"""Tasks from files and from the generated world, and what is said about rows that are wrong."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from matpo.config import JsonlData, WorldData
from matpo.datasets.jsonl import read_jsonl
from matpo.datasets.load import load_tasks
from matpo.datasets.world import documents
from matpo.errors import UserError


def written(folder: Path, *lines: str) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


GOOD = '{"question": "Who?", "answers": ["Ann"], "metadata": {"hops": 2}, "tool_arguments": {"search": {"top": 3}}}'


def test_a_row_becomes_a_task_with_everything_it_says(tmp_path: Path) -> None:
    (task,) = read_jsonl(written(tmp_path, GOOD, "", GOOD))
    assert (task.question, task.answers, task.metadata) == ("Who?", ("Ann",), {"hops": 2})
    assert task.tool_arguments == {"search": {"top": 3}}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"question": "Who?"}', "field 'answers' is missing; a row needs question (text) and answers (list of texts)"),
        ('{"question": "Who?", "answers": "Ann"}', "field 'answers' = 'Ann' must be a list of texts"),
        ('{"question": "Who?", "answers": [3]}', "field 'answers.0' = 3 must be a list of texts"),
        ('{"question": " ", "answers": ["Ann"]}', "field 'question' is empty"),
        ('{"question": "Who?", "answers": []}', "field 'answers' is empty"),
        ('{"question": "Who?", "answers": ["Ann"], "hops": 2}', "unknown field 'hops'; put further fields under"),
        ('{"question": ', "not valid JSON"),
        ("[1]", "[1] is no JSON object; a row is one, with question"),
    ],
)
def test_a_wrong_row_is_named_by_file_line_field_and_remedy(tmp_path: Path, line: str, said: str) -> None:
    path = written(tmp_path, GOOD, line)
    with pytest.raises(UserError) as caught:
        read_jsonl(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ") and said in message and "\n" not in message


def test_a_missing_or_empty_file_says_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; give a JSONL file"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="has no rows"):
        read_jsonl(written(tmp_path, ""))


def test_the_limit_counts_different_rows(tmp_path: Path) -> None:
    rows = [f'{{"question": "Q{n}", "answers": ["A"]}}' for n in (1, 1, 2, 3)]
    tasks = load_tasks(JsonlData(path=written(tmp_path, *rows), limit=2), seed=0)
    assert {task.question for task in tasks} == {"Q1", "Q2"}


def test_world_tasks_are_many_different_spread_over_worlds_and_the_same_every_time() -> None:
    data = WorldData(worlds=10, first_seed=7, questions=100, hops=(2, 3))
    tasks = load_tasks(data, seed=1)
    assert len({task.task_id for task in tasks}) == 100
    assert Counter(task.metadata["world"] for task in tasks) == dict.fromkeys(range(7, 17), 10)
    assert {task.metadata["hops"] for task in tasks} == {2, 3}
    assert [task.task_id for task in tasks] == [task.task_id for task in load_tasks(data, seed=1)]
    assert [task.task_id for task in tasks] != [task.task_id for task in load_tasks(data, seed=2)]


def test_a_world_task_searches_its_own_world_and_knows_its_proof() -> None:
    (task,) = load_tasks(WorldData(worlds=1, first_seed=5, questions=1, hops=(3,)), seed=0)
    assert task.tool_arguments == {"search": {"collection": "world-5"}}
    chain = task.metadata["chain"]
    assert isinstance(chain, list) and len(chain) == 3
    assert str(chain[-1]).endswith(task.answers[0])


def test_training_and_held_out_worlds_share_no_task() -> None:
    train = load_tasks(WorldData(worlds=20, questions=200), seed=0)
    held_out = load_tasks(WorldData(worlds=20, questions=200, first_seed=100_000), seed=0)
    assert not {task.task_id for task in train} & {task.task_id for task in held_out}


def test_settings_the_world_cannot_meet_are_refused() -> None:
    with pytest.raises(UserError, match=r"hops = \[9\]: the world has questions of \[1, 2, 3\] hops"):
        load_tasks(WorldData(hops=(9,)), seed=0)
    with pytest.raises(UserError, match=r"raise data\.worlds"):
        load_tasks(WorldData(worlds=1, questions=5_000), seed=0)


def test_the_shipped_question_files_can_be_read() -> None:
    folder = Path(__file__).resolve().parents[2] / "configs" / "data"
    train, held_out = (read_jsonl(folder / f"smollm2_{part}.jsonl") for part in ("train", "evaluation"))
    assert len(train) == 22 and len(held_out) == 8
    assert not {task.task_id for task in train} & {task.task_id for task in held_out}


def test_facts_are_answered_by_their_objects() -> None:
    tasks = load_tasks(WorldData(ask="facts", worlds=3, questions=30), seed=0)
    assert len({task.task_id for task in tasks}) == 30
    for task in tasks:
        texts = [text for _, text in documents(int(str(task.metadata["world"])))]
        assert f"{task.question} ." in texts and task.answers == (task.question.split()[2],)


def test_hops_of_facts_are_refused() -> None:
    with pytest.raises(ValueError, match='no effect with ask = "facts"'):
        WorldData(ask="facts", hops=(1,))


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    path.write_text(GOOD + "\n", encoding="utf-8-sig")
    assert len(read_jsonl(path)) == 1
