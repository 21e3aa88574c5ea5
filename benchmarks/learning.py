"""Does the quick start learn? Whole runs over several seeds; accuracy on held-out worlds, before and after.

`python -m benchmarks.learning` runs the shipped config for seeds 0, 1 and 2 (several minutes each, on an idle machine).
Each run is asked questions about worlds of its own that nobody looked at while settings were chosen. `--quick` is one
short run that shows the plumbing, not the result. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.runs import ROOT, print_result, run_matpo
from matpo.cli.display import share
from matpo.cli.lines import SummaryFile

CONFIG = ROOT / "configs" / "quickstart.toml"
FRESH_FIRST_SEED = 500_000
"""First world of the questions looked at once: seed s asks about worlds from FRESH_FIRST_SEED + 1000 s on."""
QUESTIONS = 300
QUICK = ["run.steps=4", "learner.groups_per_step=4", "evaluation.every_steps=0"]
QUICK_QUESTIONS = 24
RUN_LIMIT_S = 1_800.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """One seed's run."""

    seed: int
    seconds: float
    summary: SummaryFile

    @property
    def before(self) -> float:
        return self.summary.accuracy.before or 0.0

    @property
    def after(self) -> float:
        return self.summary.accuracy.after or 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="one short run, under 50 s")
    parser.add_argument("--dir", type=Path, help="keep the runs here")
    options = parser.parse_args()
    seeds: list[int] = options.seeds[:1] if options.quick else options.seeds
    with tempfile.TemporaryDirectory() as scratch:
        parent = options.dir or Path(scratch)
        outcomes = [play(seed, parent / f"seed-{seed}", quick=options.quick) for seed in seeds]
    Console(width=140).print(table(outcomes))
    readings = [one.summary.reading.after for one in outcomes if one.summary.reading.after is not None]
    print_result(
        {
            "seeds": len(outcomes),
            "before_mean": round(sum(one.before for one in outcomes) / len(outcomes), 4),
            "after_mean": round(sum(one.after for one in outcomes) / len(outcomes), 4),
            "min_rise": round(min(one.after - one.before for one in outcomes), 4),
            "reading_after": round(min(readings), 4) if readings else None,
        }
    )


def play(seed: int, parent: Path, *, quick: bool) -> Outcome:
    """One run of the shipped config with its own seed and its own held-out worlds."""
    questions = QUICK_QUESTIONS if quick else QUESTIONS
    overrides = [
        f"run.seed={seed}",
        f"data.evaluation.first_seed={FRESH_FIRST_SEED + 1000 * seed}",
        f"data.evaluation.questions={questions}",
        f"evaluation.questions={questions}",
        *(QUICK if quick else []),
    ]
    began = time.monotonic()
    folder = run_matpo(CONFIG, overrides, parent, limit_s=RUN_LIMIT_S)
    seconds = time.monotonic() - began
    return Outcome(seed, seconds, SummaryFile.model_validate_json((folder / "summary.json").read_bytes()))


def table(outcomes: list[Outcome]) -> Table:
    """One row per seed; every pair is before → after."""
    rows = Table(title="quick start, greedy accuracy on held-out worlds", title_justify="left")
    for column in ("seed", "all", "1 hop", "2 hops", "3 hops", "format", "reading", "sampled", "staleness", "seconds"):
        rows.add_column(column, justify="right")
    for one in outcomes:
        s = one.summary
        pairs = (s.accuracy, *(s.accuracy_by_hops.get(hops) for hops in ("1", "2", "3")), s.format, s.reading)
        arrows = ["–" if pair is None else f"{share(pair.before)} → {share(pair.after)}" for pair in pairs]
        first, last = s.sampled_before, s.sampled_after
        sampled = "–" if first is None or last is None else f"{share(first.accuracy)} → {share(last.accuracy)}"
        age = f"{s.staleness_mean or 0:.1f} (max {s.staleness_max})"
        rows.add_row(str(one.seed), *arrows, sampled, age, f"{one.seconds:.0f}")
    return rows


if __name__ == "__main__":
    main()
