"""Whole `matpo run` processes for the benchmarks that measure runs."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Self, TypeVar

import orjson
from pydantic import JsonValue

from matpo.metrics import read_metrics
from protocols.records import Record

ROOT = Path(__file__).resolve().parent.parent


def run_matpo(config: Path, overrides: Sequence[str], parent: Path, *, limit_s: float) -> Path:
    """Run `matpo run` to its end below `parent` and return the run's folder; raises with its output if it fails."""
    parent.mkdir(parents=True, exist_ok=True)
    before = set(parent.iterdir())
    command = [sys.executable, "-m", "matpo", "run", str(config), *overrides, f"run.dir={parent}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    (folder,) = set(parent.iterdir()) - before
    return folder


def metrics(folder: Path, stage: str) -> list[dict[str, JsonValue]]:
    """All metric lines of one stage, in order."""
    return [line for _, line in read_metrics(folder / "metrics.jsonl") if line["stage"] == stage]


class RunLine(Record):
    """What a book keeps of a run."""

    @property
    def cell(self) -> tuple[str, int]:
        """What the run was for, and its seed."""
        raise NotImplementedError


Kept = TypeVar("Kept", bound=RunLine)


@dataclass(slots=True)
class Book(Generic[Kept]):
    """The lines of a file of finished runs, which grows by one as soon as a run ends."""

    path: Path
    lines: list[Kept]

    @classmethod
    def open(cls, path: Path, kind: type[Kept]) -> Self:
        """An empty book where there is no file yet."""
        found = path.read_bytes().splitlines() if path.is_file() else []
        return cls(path, [kind.model_validate_json(line) for line in found])

    def has(self, cell: tuple[str, int]) -> bool:
        """Whether this was run before."""
        return any(line.cell == cell for line in self.lines)

    def add(self, line: Kept) -> None:
        """Keep a run."""
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line.model_dump_json() + "\n")


def spread(values: Sequence[float]) -> str:
    """Mean (lowest–highest)."""
    return f"{statistics.fmean(values):.0f} ({min(values):.0f}–{max(values):.0f})" if values else "–"


def print_result(result: dict[str, JsonValue]) -> None:
    """The last line of every benchmark: its figures as one JSON object."""
    print(orjson.dumps(result).decode())
