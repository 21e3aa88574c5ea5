"""Hours of the quick-start job: does anything grow? Resident memory, open files and threads of every process, and the
sizes of what the run keeps on disk, as slopes per hour after a warm-up.

`python -m benchmarks.soak [--hours 2] [--quick]`. A slope is the median of the slopes between all pairs of samples
(Theil-Sen), which a few odd samples cannot move. A quantity is flat when an hour adds less than its `LIMITS` allow;
metrics, logs and the record of what was trained grow with every step by design and are only reported. The journal
drops what every checkpoint holds (`hub.keep_trained`). The policy hardly moves (`learner.lr`), so that the work is the
same all the time. Every ten minutes the report so far is written to `--out`; Ctrl-C ends the soak early with the report
of what there is. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import orjson
import psutil
from pydantic import JsonValue
from rich.console import Console
from rich.table import Table

from benchmarks.runs import ROOT, metrics, print_result

CONFIG = ROOT / "configs" / "quickstart.toml"
OVERRIDES = ["run.steps=1000000", "learner.lr=1e-7", "hub.keep_trained=drop"]
QUICK = ["learner.groups_per_step=4", "actor.concurrency=16", "evaluation.questions=12", "evaluation.every_steps=0"]
WARM_UP = 0.25
"""Share of the soak that no slope looks at: caches fill, the journal reaches its steady size."""
REPORT_EVERY_S = 600.0
START_LIMIT_S, LEAVE_LIMIT_S = 180.0, 150.0
FILES = {
    "journal": "journal.sqlite",
    "journal wal": "journal.sqlite-wal",
    "metrics": "metrics.jsonl",
    "record of what was trained": "consumed.jsonl",
}
FOLDERS = ("checkpoints", "weights", "outbox", "traces", "logs")
Unit = Literal["bytes", "files", "threads"]
LIMITS: Mapping[Unit, tuple[float, float]] = {
    "bytes": (0.02, 4 * 2**20),
    "files": (0.0, 0.5),
    "threads": (0.0, 0.5),
}
"""Most an hour may add: this share of the median, or this much, whichever is more."""
GROWS_BY_DESIGN = ("disk logs", "disk metrics", "disk record of what was trained")


@dataclass(slots=True)
class Series:
    """One quantity over time."""

    unit: Unit
    at_s: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def per_hour(self, after_s: float) -> float | None:
        """Theil-Sen slope of the samples after `after_s`; None for fewer than three."""
        at, values = np.array(self.at_s), np.array(self.values)
        kept = at >= after_s
        at, values = at[kept], values[kept]
        if len(at) < 3:
            return None
        first, second = np.triu_indices(len(at), k=1)
        return float(np.median((values[second] - values[first]) / (at[second] - at[first]))) * 3600

    def grows(self, after_s: float) -> bool:
        """Whether an hour adds more than `LIMITS` allow."""
        slope = self.per_hour(after_s)
        share, least = LIMITS[self.unit]
        return slope is not None and slope > max(share * float(np.median(self.values)), least)


@dataclass(slots=True)
class Soak:
    """What was seen of one run."""

    root: psutil.Process
    folder: Path
    began: float = field(default_factory=time.monotonic)
    series: dict[str, Series] = field(default_factory=dict)
    pids: dict[str, set[int]] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def span_s(self) -> float:
        """From the first step to the last sample."""
        return max((series.at_s[-1] for series in self.series.values()), default=0.0)

    @property
    def restarts(self) -> dict[str, int]:
        """Processes that were started again, and how often: in a soak nothing is killed."""
        return {name: len(pids) - 1 for name, pids in self.pids.items() if len(pids) > 1}

    def sample(self) -> None:
        """Look at every process and every file once."""
        at_s, seen = self.seconds, Counter[str]()
        for name, process in named_processes(self.root):
            seen[name] += 1
            unique = name if seen[name] == 1 else f"{name} {seen[name]}"
            try:
                self._note(f"{unique} resident", "bytes", at_s, process.memory_info().rss)
                self._note(f"{unique} open files", "files", at_s, process.num_fds())
                self._note(f"{unique} threads", "threads", at_s, process.num_threads())
            except (psutil.NoSuchProcess, psutil.ZombieProcess, ProcessLookupError, FileNotFoundError):
                continue
            self.pids.setdefault(unique, set()).add(process.pid)
        for name, size in disk_bytes(self.folder).items():
            self._note(f"disk {name}", "bytes", at_s, size)

    def _note(self, name: str, unit: Unit, at_s: float, value: float) -> None:
        series = self.series.setdefault(name, Series(unit))
        series.at_s.append(at_s)
        series.values.append(value)

    def growing(self) -> list[str]:
        """Quantities that are not flat."""
        after_s = WARM_UP * self.span_s
        return [n for n, s in self.series.items() if n not in GROWS_BY_DESIGN and s.grows(after_s)]

    def report(self) -> dict[str, JsonValue]:
        """All figures; bytes in MiB."""
        after_s = WARM_UP * self.span_s
        growing = self.growing()
        quantities: dict[str, JsonValue] = {}
        for name, series in self.series.items():
            scale = 2**20 if series.unit == "bytes" else 1
            slope = series.per_hour(after_s)
            quantities[name] = {
                "median": round(float(np.median(series.values)) / scale, 3),
                "last": round(series.values[-1] / scale, 3),
                "per_hour": None if slope is None else round(slope / scale, 3),
                "flat": None if name in GROWS_BY_DESIGN else name not in growing,
            }
        return {
            "hours": round(self.span_s / 3600, 3),
            "steps": len(metrics(self.folder, "trainer")),
            "samples": max((len(series.values) for series in self.series.values()), default=0),
            "restarts": dict(self.restarts),
            "flat": not growing and not self.restarts,
            "growing": list(growing),
            "quantities": quantities,
        }


def named_processes(root: psutil.Process) -> Iterator[tuple[str, psutil.Process]]:
    """The run's processes with names that stay the same over a restart, parents first."""
    yield "run", root
    below = [(child, "run") for child in children(root)]
    while below:
        process, parent = below.pop(0)
        try:
            name = process_name(process.cmdline(), parent)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        yield name, process
        below += [(child, name) for child in children(process)]


def children(process: psutil.Process) -> list[psutil.Process]:
    """Those of now; none when it has just ended."""
    try:
        return process.children()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def process_name(command: Sequence[str], parent: str) -> str:
    """`hub`, `actor-0`, `actor-0 search`, … from a command line."""
    if "--actor-id" in command:
        return command[command.index("--actor-id") + 1]
    if "-m" not in command:
        return f"{parent} {Path(command[0]).name}" if command else f"{parent} helper"
    module = command[command.index("-m") + 1]
    return module.rpartition(".")[2] if module.startswith("learner") else f"{parent} {module.rpartition('.')[2]}"


def disk_bytes(folder: Path) -> dict[str, int]:
    """Sizes of what a run keeps."""
    sizes = {name: size_bytes(folder / file) for name, file in FILES.items()}
    return sizes | {name: sum(size_bytes(f) for f in (folder / name).rglob("*")) for name in FOLDERS}


def size_bytes(path: Path) -> int:
    """0 for what is gone, or no file."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:
        return 0


@contextmanager
def job(parent: Path, overrides: Sequence[str]) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """`matpo run` of the quick start and its folder; stopped in order at the end."""
    parent.mkdir(parents=True, exist_ok=True)
    before = set(parent.iterdir())
    command = [sys.executable, "-m", "matpo", "run", str(CONFIG), *overrides, f"run.dir={parent}"]
    with (parent / "matpo_run.out").open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process, new_folder(process, parent, before)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(LEAVE_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # the second one stops at once
            process.wait(30)


def new_folder(process: subprocess.Popen[bytes], parent: Path, before: set[Path]) -> Path:
    """The folder of the run, once it takes steps. Raises `RuntimeError` when it ends before."""
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        folders = [path for path in set(parent.iterdir()) - before if path.is_dir()]
        if folders and metrics(folders[0], "trainer"):
            return folders[0]
        time.sleep(0.2)
    raise RuntimeError(f"the job took no step: {(parent / 'matpo_run.out').read_text(encoding='utf-8')[-2000:]}")


def soak(parent: Path, *, seconds: float, every_s: float, overrides: Sequence[str], out: Path | None) -> Soak:
    """Watch the job for so long, or until SIGINT or SIGTERM."""
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    with job(parent, overrides) as (process, folder):
        seen = Soak(psutil.Process(process.pid), folder)
        report_due = REPORT_EVERY_S
        while seen.seconds < seconds and not stopping.is_set():
            if process.poll() is not None:
                raise RuntimeError(f"the job ended with {process.returncode}; see {parent / 'matpo_run.out'}")
            seen.sample()
            if seen.seconds >= report_due:
                report_due += REPORT_EVERY_S
                write(seen, out)
            stopping.wait(every_s)
        write(seen, out)
    return seen


def write(seen: Soak, out: Path | None) -> None:
    """Put the report in its place in one step."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = out.with_suffix(".tmp")
        draft.write_bytes(orjson.dumps(seen.report(), option=orjson.OPT_INDENT_2) + b"\n")
        draft.replace(out)


def table(seen: Soak) -> Table:
    """One row per quantity."""
    rows = Table("quantity", "median", "last", "per hour", "verdict", title="soak", title_justify="left")
    after_s, growing = WARM_UP * seen.span_s, seen.growing()
    for name, series in sorted(seen.series.items()):
        scale, unit = (2**20, " MiB") if series.unit == "bytes" else (1, "")
        slope = series.per_hour(after_s)
        shown = "–" if slope is None else f"{slope / scale:+.2f}{unit}"
        verdict = "by design" if name in GROWS_BY_DESIGN else "GROWS" if name in growing else "flat"
        median = float(np.median(series.values)) / scale
        rows.add_row(name, f"{median:.1f}{unit}", f"{series.values[-1] / scale:.1f}{unit}", shown, verdict)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--quick", action="store_true", help="half a minute: shows the plumbing, not the result")
    parser.add_argument("--every-s", type=float, default=30.0, help="seconds between two samples")
    parser.add_argument("--dir", type=Path, help="keep the run here")
    parser.add_argument("--out", type=Path, help="write the report here, every ten minutes and at the end")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        seen = soak(
            options.dir or Path(scratch),
            seconds=20.0 if options.quick else 3600 * options.hours,
            every_s=1.0 if options.quick else options.every_s,
            overrides=[*OVERRIDES, *(QUICK if options.quick else [])],
            out=options.out,
        )
        Console(width=120).print(table(seen))
        report = seen.report()
    print_result(report)


if __name__ == "__main__":
    main()
