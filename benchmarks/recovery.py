"""How long is a run without its trainer, and does anybody else notice that a process was killed?

`python -m benchmarks.recovery [--kills 3] [--quick]`: the quick start with three actors; the trainer, then an actor, is
killed with SIGKILL so many times. For the trainer: seconds to the next optimizer step, how many of them starting Python
and loading the model took, and the tokens that actors delivered per second until then (or until admission was full),
over those before the kill. For an actor: the tokens of the *others* until its successor is ready, over theirs before;
1 means that its death costs exactly its share. Tokens are counted by the journal, figures are medians over the kills,
and the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import random
import signal
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import orjson
import psutil
from pydantic import JsonValue

from benchmarks.chaos import PAGE_MARK, RESULTS
from benchmarks.runs import metrics, print_result
from benchmarks.soak import job
from tests.chaos.processes import with_role
from tests.end_to_end.processes import SMALL

ACTORS = 3
OVERRIDES = (
    "run.steps=1000000", f"actor.count={ACTORS}", "evaluation.every_steps=0", "hub.lease_s=10",
    "freshness.eta=24", "freshness.max_staleness_steps=64", "learner.checkpoint_every_steps=2",
)  # fmt: skip
"""Admission so wide that it does not end the gap: what is asked is whether actors go on, not how long they may."""
WARM_UP_STEPS = 3
LIMIT_S = 150.0
LOOK_EVERY_S = 0.05


@dataclass(frozen=True)
class Gap:
    """One kill and what it cost."""

    seconds: float
    """Until the next optimizer step (trainer), or until the successor is ready (actor)."""
    loading_s: float
    """Of these, from the start of the new process until it was ready."""
    before_tokens_per_s: float
    """Sampled by everybody but the victim, in the seconds before …"""
    during_tokens_per_s: float
    """… and until the gap ended or admission was full."""
    counted_s: float
    """How long that was."""

    @property
    def ratio(self) -> float:
        return self.during_tokens_per_s / self.before_tokens_per_s


@dataclass(frozen=True)
class Observed:
    """A run under way, looked at from outside."""

    folder: Path
    parent: Path
    window_s: float

    def kill_trainer(self) -> Gap:
        self._breathe()
        (trainer,) = with_role(self.parent, "trainer")
        killed = time.time()
        trainer.kill()
        stepped = wait_for(lambda: self._first(metrics_times(self.folder, "trainer"), killed), "an optimizer step")
        ready = self._logged("trainer", "trainer ready", killed)
        started = self._logged("learner", "started", killed)
        full = self._first(
            (at for at, line in metrics_lines(self.folder, "hub") if line["admissible"] == 0), killed, or_else=stepped
        )
        return self._gap(killed, stepped, ready - started, counted_until=min(full, stepped), without="")

    def kill_actor(self, number: int) -> Gap:
        self._breathe()
        name = f"actor-{number}"
        (actor,) = [process for process in with_role(self.parent, "actor") if name in process.cmdline()]
        killed = time.time()
        actor.kill()
        ready = wait_for(lambda: self._logged(name, "ready", killed), f"another {name}")
        started = self._logged("run", "started", killed)
        return self._gap(killed, ready, ready - started, counted_until=ready, without=name)

    def _breathe(self) -> None:
        """Let the run be as it always is for the window that is compared with."""
        begun = time.time()
        wait_for(lambda: time.time() if time.time() - begun >= self.window_s else 0.0, "the window before a kill")

    def _gap(self, killed: float, over: float, loading_s: float, *, counted_until: float, without: str) -> Gap:
        return Gap(
            seconds=round(over - killed, 2),
            loading_s=round(loading_s, 2),
            before_tokens_per_s=round(self._tokens_per_s(killed - self.window_s, killed, without), 1),
            during_tokens_per_s=round(self._tokens_per_s(killed, counted_until, without), 1),
            counted_s=round(counted_until - killed, 2),
        )

    def _tokens_per_s(self, begin: float, end: float, without: str) -> float:
        question = (
            "SELECT COALESCE(SUM(sampled_tokens), 0) FROM trees WHERE received_at BETWEEN ? AND ? AND actor_id != ?"
        )
        path = self.folder / "journal.sqlite"
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as journal:
            (tokens,) = journal.execute(question, (begin, end, without)).fetchone()
        return int(tokens) / (end - begin)

    def _logged(self, component: str, event: str, after: float) -> float:
        """When a component first logged an event after that moment; 0 for not yet."""
        lines = (self.folder / "logs" / f"{component}.jsonl").read_bytes().splitlines()
        read = (orjson.loads(line) for line in lines if line)
        return self._first(
            (datetime.fromisoformat(line["timestamp"]).timestamp() for line in read if line["event"] == event), after
        )

    @staticmethod
    def _first(moments: Iterator[float], after: float, or_else: float = 0.0) -> float:
        return next((moment for moment in moments if moment > after), or_else)


def metrics_lines(folder: Path, stage: str) -> Iterator[tuple[float, dict[str, JsonValue]]]:
    """Unix time and line."""
    for line in metrics(folder, stage):
        at = line["time"]
        assert isinstance(at, float)
        yield at, line


def metrics_times(folder: Path, stage: str) -> Iterator[float]:
    return (at for at, _ in metrics_lines(folder, stage))


def wait_for(moment: Callable[[], float], what: str) -> float:
    """Until `moment` gives something else than 0; files of other processes can only be looked at."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        found = moment()
        if found:
            return found
        time.sleep(LOOK_EVERY_S)
    raise RuntimeError(f"no {what} within {LIMIT_S:g} s")


@contextmanager
def observed(parent: Path, overrides: Sequence[str], window_s: float) -> Iterator[Observed]:
    """The job, once it has warmed up; everything of it is gone at the end."""
    with job(parent, overrides) as (process, folder):
        wait_for(lambda: float(len(metrics(folder, "trainer")) >= WARM_UP_STEPS), "warm run")
        assert psutil.Process(process.pid).is_running()
        yield Observed(folder, parent, window_s)


def summed_up(gaps: Sequence[Gap]) -> dict[str, JsonValue]:
    """Medians, and every kill."""
    return {
        "kills": len(gaps),
        "seconds": statistics.median(gap.seconds for gap in gaps),
        "most_seconds": max(gap.seconds for gap in gaps),
        "loading_s": statistics.median(gap.loading_s for gap in gaps),
        "tokens_ratio": round(statistics.median(gap.ratio for gap in gaps), 3),
        "each": [asdict(gap) for gap in gaps],
    }


def page(result: dict[str, dict[str, JsonValue]]) -> str:
    """The part of the page of `benchmarks.chaos` that is about recovery."""
    trainer, actor = result["trainer"], result["actor"]
    return (
        f"{PAGE_MARK}\n\n# Recovery\n\n"
        f"`python -m benchmarks.recovery --kills {trainer['kills']}`: the quick start with {ACTORS} actors on two"
        " cores, medians over the kills.\n\n"
        "| kill -9 of | until | seconds (worst) | of these loading | tokens/s of the others, during / before |\n"
        "|---|---|---|---|---|\n"
        f"| the trainer | the next optimizer step | {trainer['seconds']} ({trainer['most_seconds']}) |"
        f" {trainer['loading_s']} | {trainer['tokens_ratio']} |\n"
        f"| an actor | its successor plays | {actor['seconds']} ({actor['most_seconds']}) |"
        f" {actor['loading_s']} | {actor['tokens_ratio']} |\n"
    )


def write(result: dict[str, dict[str, JsonValue]], out: Path) -> None:
    """Put the figures into `out` and below the mark of the page beside the chaos run's."""
    out.write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2) + b"\n")
    chaos = RESULTS.with_suffix(".md")
    above = chaos.read_text(encoding="utf-8").partition(PAGE_MARK)[0].rstrip() if chaos.is_file() else ""
    chaos.write_text(f"{above}\n\n{page(result)}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3, help="of the trainer, and as many of actors")
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--quick", action="store_true", help="one kill each, under a minute: shows the plumbing")
    parser.add_argument("--out", type=Path, default=RESULTS.with_name("recovery.json"))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    rng = random.Random(options.seed)
    kills, window_s = (1, 5.0) if options.quick else (options.kills, 15.0)
    overrides = [*OVERRIDES, *(SMALL if options.quick else ())]
    with (
        tempfile.TemporaryDirectory(prefix="recovery-") as scratch,
        observed(Path(scratch), overrides, window_s) as run,
    ):
        trainer = [run.kill_trainer() for _ in range(kills)]
        actor = [run.kill_actor(rng.randrange(ACTORS)) for _ in range(kills)]
    result = {"trainer": summed_up(trainer), "actor": summed_up(actor)}
    if not options.quick:
        write(result, options.out)
    print(page(result))
    print_result({name: dict(figures) for name, figures in result.items()})


if __name__ == "__main__":
    main()
