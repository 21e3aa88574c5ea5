"""Learning comparisons: whole `matpo run`s of a CPU task, one cell per choice and seed, resumable.

    python -m benchmarks.learning_matrix --objectives dppo decoupled tis cispo clip reinforce --etas 0 2 8
    python -m benchmarks.learning_matrix --credits broadcast leave_one_out role_group hierarchical --go
    python -m benchmarks.learning_matrix --configs configs/magrpo_volunteer.toml --go --most 3

Without `--go` it only lists what it would run. Every finished run is one line of docs/results/learning_matrix.jsonl,
and a cell that has its line is not run again; the page beside it, learning_matrix.md, is written anew from all lines.
`reinforce` is the uncorrected objective. A run of the quick start takes 3 minutes of one idle core. `--quick` runs
one cell of two steps without keeping anything. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from benchmarks.runs import ROOT, Book, RunLine, metrics, print_result, run_matpo, spread
from matpo.cli.display import spark
from matpo.cli.lines import SummaryFile

CONFIG = Path("configs/quickstart.toml")
LINES = ROOT / "docs" / "results" / "learning_matrix.jsonl"
PAGE = ROOT / "docs" / "results" / "learning_matrix.md"
MINUTES = 3.0
"""Of one idle core, for a run of the quick start."""
RUN_LIMIT_S = 3_600.0
HEADS = ("choice", "seeds", "before", "after", "reward", "staleness", "mismatch KL", "signs", "curve")
POINTS = 30
"""A curve has so many, each the mean over some steps."""
QUICK = ("run.steps=2", "learner.groups_per_step=4", "evaluation.questions=8", "evaluation.every_steps=0")


@dataclass(frozen=True, slots=True)
class Cell:
    """One choice, to be run with one seed."""

    config: Path
    choice: str
    """In words."""
    settings: tuple[str, ...]
    """What makes the choice, on top of the config file."""
    common: tuple[str, ...]
    """What all cells of a comparison override."""
    seed: int

    @property
    def base(self) -> str:
        """What the choices of a comparison have in common."""
        return " ".join((str(self.config), *self.common))


class Line(RunLine):
    """One finished run."""

    base: str
    choice: str
    seed: int
    steps: int
    before: float | None
    """Share of held-out questions answered right, greedily."""
    after: float | None
    rewards: list[float]
    """Mean reward of the training episodes of every step."""
    sampled_tokens: int
    staleness_mean: float | None
    staleness_max: int | None
    mismatch_kl_max: float | None
    """Largest of any step."""
    entropy_last: float | None
    signs: int
    """Steps that showed signs of a collapse."""
    seconds: float

    @property
    def cell(self) -> tuple[str, int]:
        """What the run was for."""
        return f"{self.base}: {self.choice}", self.seed


def play(cell: Cell, parent: Path) -> Line:
    """Run one cell to its end."""
    began = time.monotonic()
    settings = [*cell.settings, f"run.seed={cell.seed}", *cell.common]
    folder = run_matpo(ROOT / cell.config, settings, parent, limit_s=RUN_LIMIT_S)
    summary = SummaryFile.model_validate_json((folder / "summary.json").read_bytes())
    steps = metrics(folder, "trainer")
    vitals = [one for line in steps if isinstance(one := line["vitals"], dict)]
    mismatch = [value for one in vitals if isinstance(value := one["mismatch_kl"], float)]
    entropy = [value for one in vitals if isinstance(value := one["entropy"], float)]
    return Line(
        base=cell.base,
        choice=cell.choice,
        seed=cell.seed,
        steps=len(steps),
        before=summary.accuracy.before,
        after=summary.accuracy.after,
        rewards=[round(value, 4) for line in steps if isinstance(value := line["reward_mean"], float)],
        sampled_tokens=sum(value for line in steps if isinstance(value := line["sampled_tokens"], int)),
        staleness_mean=summary.staleness_mean,
        staleness_max=summary.staleness_max,
        mismatch_kl_max=max(mismatch, default=None),
        entropy_last=entropy[-1] if entropy else None,
        signs=sum(bool(one["signs"]) for one in vitals),
        seconds=round(time.monotonic() - began, 1),
    )


def attempt(cell: Cell, parent: Path) -> Line | None:
    """Run one cell; None, with the reason printed, if the run failed."""
    try:
        return play(cell, parent)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        print(f"FAILED: {str(error)[-2000:]}", flush=True)
        return None


def page(lines: Sequence[Line]) -> str:
    """The tables and the curves, one table for each comparison."""
    rows = [
        "# What learns how well",
        "",
        "`python -m benchmarks.learning_matrix`: every line of `learning_matrix.jsonl` is one whole `matpo run`.",
        "Greedy accuracy on held-out questions in %, mean over seeds (lowest–highest). *Reward*: of training episodes,",
        "at temperature 1, first → last fifth of the steps; the curve is the same, step by step, from 0 to 1.",
        "`reinforce` does not correct for staleness. *Mismatch KL*: the largest of any step. *Signs*: steps that",
        "showed signs of a collapse.",
    ]
    for base in sorted({line.base for line in lines}):
        rows += ["", f"`{base}`", "", f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
        here = [line for line in lines if line.base == base]
        for choice in sorted({line.choice for line in here}):
            rows.append(row(choice, [line for line in here if line.choice == choice]))
    return "\n".join(rows) + "\n"


def row(choice: str, runs: Sequence[Line]) -> str:
    """One choice, over its seeds."""
    fifth = [max(1, len(run.rewards) // 5) for run in runs]
    first = [statistics.fmean(run.rewards[:count]) for run, count in zip(runs, fifth, strict=True)]
    last = [statistics.fmean(run.rewards[-count:]) for run, count in zip(runs, fifth, strict=True)]
    stale = [run.staleness_mean for run in runs if run.staleness_mean is not None]
    mismatch = [run.mismatch_kl_max for run in runs if run.mismatch_kl_max is not None]
    cells = (
        choice,
        str(len(runs)),
        spread([100 * run.before for run in runs if run.before is not None]),
        spread([100 * run.after for run in runs if run.after is not None]),
        f"{statistics.fmean(first):.2f} → {statistics.fmean(last):.2f} ({min(last):.2f}–{max(last):.2f})",
        f"{statistics.fmean(stale):.1f}" if stale else "–",
        f"{max(mismatch):.2g}" if mismatch else "–",
        str(sum(run.signs for run in runs)),
        curve([run.rewards for run in runs]),
    )
    return f"| {' | '.join(cells)} |"


def curve(runs: Sequence[Sequence[float]]) -> str:
    """The mean over runs, as bars between 0 and 1."""
    length = min(map(len, runs))
    means = [statistics.fmean(run[step] for run in runs) for step in range(length)]
    width = max(1, -(-length // POINTS))
    points = [min(1.0, max(0.0, statistics.fmean(means[at : at + width]))) for at in range(0, length, width)]
    return spark([0.0, 1.0, *points])[2:]


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """What was asked for: objectives at every eta, then credit schemes, then configs, each for every seed."""
    choices = [
        *(
            (options.config, *made(objective, "broadcast", eta))
            for objective in options.objectives
            for eta in options.etas
        ),
        *((options.config, *made("dppo", credit, 2)) for credit in options.credits),
        *((config, "as shipped", ()) for config in options.configs),
    ]
    for seed in options.seeds:  # a whole round of one seed first: an early stop then leaves comparable cells
        for config, choice, settings in dict.fromkeys(choices):
            yield Cell(config, choice, settings, tuple(options.set), seed)


def made(objective: str, credit: str, eta: int) -> tuple[str, tuple[str, ...]]:
    """A choice in words, and as settings."""
    settings = (f'learner.objective={{name = "{objective}"}}', f'learner.credit="{credit}"', f"freshness.eta={eta}")
    return f"{objective} · {credit} · eta {eta}", settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--etas", type=int, nargs="+", default=[0, 2, 8])
    parser.add_argument("--credits", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--configs", type=Path, nargs="+", default=[], help="to be run as they are")
    parser.add_argument("--config", type=Path, default=CONFIG, help="of --objectives and --credits (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", default=[], metavar="section.key=value", help="for every run")
    parser.add_argument("--go", action="store_true", help="run what is not there yet")
    parser.add_argument("--most", type=int, default=10**6, metavar="N", help="run at most so many now")
    parser.add_argument("--lines", type=Path, default=LINES)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--quick", action="store_true", help="one cell of two steps, nothing kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.quick:
            once = play(Cell(CONFIG, *made("reinforce", "leave_one_out", 2), QUICK, 0), Path(scratch))
            print(page([once]))
            print_result({"runs": 1, "steps": once.steps, "signs": once.signs})
            return
        book = Book.open(options.lines, Line)
        missing = [cell for cell in cells(options) if not book.has((f"{cell.base}: {cell.choice}", cell.seed))]
        done = 0
        for number, cell in enumerate(missing):
            now = options.go and number < options.most
            print(f"{'run' if now else 'to run'}: {cell.base}: {cell.choice}, seed {cell.seed}", flush=True)
            if now and (line := attempt(cell, Path(scratch) / str(number))) is not None:
                book.add(line)
                done += 1
        if book.lines:
            options.page.write_text(page(book.lines), encoding="utf-8")
    result: dict[str, JsonValue] = {
        "runs_kept": len(book.lines),
        "runs_left": len(missing) - done,
        "minutes_left_on_an_idle_core": round((len(missing) - done) * MINUTES),
    }
    print_result(result)


if __name__ == "__main__":
    main()
