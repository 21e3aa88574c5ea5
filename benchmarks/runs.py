"""Whole `matpo run` processes for the benchmarks that measure runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import orjson
from pydantic import JsonValue

from matpo.metrics import read_metrics

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


def print_result(result: dict[str, JsonValue]) -> None:
    """The last line of every benchmark: its figures as one JSON object."""
    print(orjson.dumps(result).decode())
