"""Questions from a file: one JSON object a line."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import orjson
from pydantic import Field, JsonValue, ValidationError

from matpo.errors import UserError
from protocols.records import Record, Task

_FORMS: Final = {
    "question": "a text",
    "answers": "a list of texts",
    "metadata": "an object",
    "tool_arguments": "an object: tool → argument → value",
}


class Row(Record):
    """One line of a question file."""

    question: str
    answers: tuple[str, ...]
    metadata: dict[str, JsonValue] = Field(default_factory=dict)
    tool_arguments: dict[str, dict[str, JsonValue]] = Field(default_factory=dict)


def read_jsonl(path: Path, *, limit: int | None = None) -> list[Task]:
    """The tasks of a file, in its order, at most `limit`; equal rows are one task.

    Raises `UserError` naming file, line, field and remedy.
    """
    if not path.is_file():
        raise UserError(
            f"dataset {str(path)!r} does not exist; give a JSONL file with question and answers on each line"
        )
    tasks: dict[str, Task] = {}
    for task in _tasks(path):
        if limit is not None and len(tasks) >= limit:
            break
        tasks.setdefault(task.task_id, task)
    if not tasks:
        raise UserError(f"dataset {str(path)!r} has no rows; write one JSON object with question and answers per line")
    return list(tasks.values())


def _tasks(path: Path) -> Iterator[Task]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if text.strip():
                row = _row(text, f"{path}:{number}")
                yield Task.make(row.question, row.answers, row.metadata, row.tool_arguments)


def _row(line: bytes, where: str) -> Row:
    try:
        row = Row.model_validate(orjson.loads(line))
    except orjson.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg}); write one object per line, in UTF-8") from error
    except ValidationError as error:
        raise UserError(f"{where}: {_problem(error)}") from error
    for field, empty in (("question", not row.question.strip()), ("answers", not any(a.strip() for a in row.answers))):
        if empty:
            raise UserError(f"{where}: field {field!r} is empty; give at least one")
    return row


def _problem(error: ValidationError) -> str:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    given = repr(first["input"])[:60]
    if not field:
        return f"{given} is no JSON object; a row is one, with question (text) and answers (list of texts)"
    if first["type"] == "missing":
        return f"field {field!r} is missing; a row needs question (text) and answers (list of texts)"
    if first["type"] == "extra_forbidden":
        return f'unknown field {field!r}; put further fields under "metadata"'
    return f"field {field!r} = {given} must be {_FORMS[str(first['loc'][0])]}"
