"""The run's figures as JSON lines, appended by several processes, read by the display, the doctor and the summary."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import orjson
from pydantic import JsonValue

from matpo.errors import NO_SPACE
from matpo.redaction import hide
from protocols.records import Record

Stage = Literal["trainer", "hub", "evaluation", "weights", "actor"]


class MetricsFile:
    """Appends whole lines with one write each, so that lines of several processes never mix. A line that a full disk
    does not take is left out: figures are worth less than the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._torn = False
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def append(self, stage: Stage, record: Record) -> None:
        """Write one line: the Unix time, the stage, then the record's fields."""
        line = {"time": round(time.time(), 3), "stage": stage, **record.model_dump(mode="json")}
        content = (b"\n" if self._torn else b"") + hide(orjson.dumps(line).decode()).encode() + b"\n"
        try:
            self._torn = os.write(self._descriptor, content) < len(content)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise

    def close(self) -> None:
        os.close(self._descriptor)


def read_metrics(path: Path, *, offset: int = 0) -> Iterator[tuple[int, dict[str, JsonValue]]]:
    """Yield (offset after the line, line) for every complete line from `offset` on; a half-written last line waits, and
    one that was torn by a full disk, or is none of ours, is passed over."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                content: JsonValue = orjson.loads(line)
            except orjson.JSONDecodeError:
                continue
            if isinstance(content, dict) and "stage" in content:
                yield offset, content
