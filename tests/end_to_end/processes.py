"""Start the real commands as a user would, and look at the processes they start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import orjson
import psutil

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.toml"
QUICKSTART_SGLANG = ROOT / "configs" / "quickstart_sglang_cpu.toml"
SMALL = (
    "learner.groups_per_step=4",
    "learner.group_size=4",
    "actor.concurrency=16",
    "evaluation.questions=12",
    "evaluation.every_steps=0",
    "data.train.worlds=8",
    "data.train.questions=64",
    "data.evaluation.worlds=4",
    "data.evaluation.questions=12",
)
"""Overrides that make a step of the quick start a second's work …"""
SHORT = ("run.steps=6", "learner.checkpoint_every_steps=2", *SMALL)
"""… and a run of it one of seconds instead of minutes."""


def environment() -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "COLUMNS": "160",
    }


def matpo(*arguments: str, timeout_s: float = 240.0) -> subprocess.CompletedProcess[str]:
    """Run one `matpo` command to its end, from the project's root."""
    return subprocess.run(
        [sys.executable, "-m", "matpo", *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@dataclass(frozen=True)
class Command:
    """A command under way."""

    process: subprocess.Popen[str]

    def descendants(self, *words: str) -> list[psutil.Process]:
        """Processes below this one whose command line holds all `words`."""
        found = []
        if self.process.poll() is not None:
            return []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                line = child.cmdline()
            except psutil.NoSuchProcess:
                continue
            if all(word in line for word in words):
                found.append(child)
        return found


@contextmanager
def started(*arguments: str) -> Iterator[Command]:
    """A `matpo` command running in the background; whatever it leaves behind is ended by its own id."""
    with begun("-m", "matpo", *arguments) as command:
        yield command


@contextmanager
def begun(*arguments: str) -> Iterator[Command]:
    """Any Python command, likewise."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    command = Command(process)
    try:
        yield command
    finally:
        left = command.descendants() if process.poll() is None else []
        for leftover in [*left, psutil.Process(process.pid)] if process.poll() is None else left:
            try:
                leftover.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        process.communicate(timeout=30)


def only_run(parent: Path) -> Path:
    """The one run folder below `parent`."""
    (run,) = (path for path in parent.iterdir() if path.is_dir())
    return run


def summary(run: Path) -> dict[str, object]:
    content = orjson.loads((run / "summary.json").read_bytes())
    assert isinstance(content, dict)
    return content


def short_run(parent: Path, *more: str, config: Path = QUICKSTART) -> Sequence[str]:
    """Arguments of a short quick-start run below `parent`."""
    return ["run", str(config), *SHORT, f"run.dir={parent}", *more]
