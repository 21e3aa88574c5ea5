"""Planner and workers against a single agent, where nobody may hold more than so many tokens, at equal sampled tokens.

    python -m benchmarks.context_limit [--seeds 0 1 2] [--steps 30] [--go]

Three arms from one checkpoint (`models/alone`, which knows the roles of all): `team` and `alone` may hold `LIMIT`
tokens, `alone, roomy` may hold `ROOMY`. Every held-out round is placed at the training tokens sampled until then, those
of filtered groups included (from the run's journal); arms are compared where the shortest run ended. Without `--go` it
lists what it would run. A finished run is one line of docs/results/context_limit.jsonl; the page beside it is written
anew from all lines. `--quick`: two steps of one arm, nothing kept. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import sqlite3
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from benchmarks.runs import ROOT, Book, RunLine, metrics, print_result, run_matpo, spread
from matpo.cli.display import spark
from matpo.cli.lines import EvaluationLine, TrainerLine
from protocols.records import Record

LINES = ROOT / "docs" / "results" / "context_limit.jsonl"
PAGE = ROOT / "docs" / "results" / "context_limit.md"
LIMIT, ROOMY = 96, 256
RUN_LIMIT_S = 3_600.0
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the budget: where the curves are read."""
QUICK = ("run.steps=2", "learner.groups_per_step=4", "evaluation.questions=32", "evaluation.every_steps=0")


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to play."""

    name: str
    config: Path
    settings: tuple[str, ...] = ()


ARMS = (
    Arm("team", Path("configs/compare/team.toml")),
    Arm("alone", Path("configs/compare/alone.toml")),
    Arm("alone, roomy", Path("configs/compare/alone.toml"), (f"episode.roles.agent.max_context_tokens={ROOMY}",)),
)


class Round(Record):
    """One round of held-out questions, greedy."""

    sampled_tokens: int
    """Of training episodes, until the weights of this round were there."""
    accuracy: float
    by_hops: dict[str, float]


class Line(RunLine):
    """One finished run."""

    arm: str
    seed: int
    steps: int
    rounds: list[Round]
    truncated: dict[str, float]
    """Share of the last step's trajectories that a limit cut off, by role."""

    @property
    def cell(self) -> tuple[str, int]:
        """What the run was for."""
        return self.arm, self.seed


def play(arm: Arm, seed: int, settings: Sequence[str], parent: Path) -> Line:
    """Run one arm to its end."""
    folder = run_matpo(ROOT / arm.config, [f"run.seed={seed}", *arm.settings, *settings], parent, limit_s=RUN_LIMIT_S)
    rounds = [EvaluationLine.model_validate(line) for line in metrics(folder, "evaluation")]
    last = TrainerLine.model_validate(metrics(folder, "trainer")[-1])
    return Line(
        arm=arm.name,
        seed=seed,
        steps=last.step,
        rounds=[
            Round(
                sampled_tokens=sampled_until(folder, one.step),
                accuracy=one.accuracy,
                by_hops=one.accuracy_by_hops,
            )
            for one in rounds
            if one.accuracy is not None
        ],
        truncated={role: plays.truncated for role, plays in last.role_plays.items()},
    )


def sampled_until(folder: Path, step: int) -> int:
    """Training tokens that had been sampled when the step was done, by the journal."""
    with closing(sqlite3.connect(f"file:{folder / 'journal.sqlite'}?mode=ro", uri=True)) as journal:
        (tokens,) = journal.execute(
            "SELECT COALESCE(SUM(sampled_tokens), 0) FROM trees WHERE state != 'evaluation'"
            " AND received_at <= (SELECT COALESCE(MAX(done_at), 0) FROM steps WHERE step <= ?)",
            (step,),
        ).fetchone()
    return int(tokens)


def read_at(line: Line, tokens: float, hops: str | None = None) -> float:
    """Accuracy in % at a number of sampled tokens: between two rounds, on the straight line.

    Rounds that asked no question of so many hops are passed over.
    """
    known = [
        (one.sampled_tokens, one.accuracy if hops is None else one.by_hops[hops])
        for one in line.rounds
        if hops is None or hops in one.by_hops
    ]
    places, values = zip(*sorted(known), strict=True)
    return 100 * float(np.interp(tokens, places, values))


def page(lines: Sequence[Line]) -> str:
    """The table and the curves."""
    budget = min(line.rounds[-1].sampled_tokens for line in lines)
    points = [share * budget for share in SHARES]
    heads = " | ".join(f"{tokens / 1000:.0f}k tokens" for tokens in points)
    rows = [
        "# Planner and workers against a single agent under a context limit",
        "",
        "`python -m benchmarks.context_limit --go`: all arms start from `models/alone`, which knows the roles of all.",
        f"*team* (planner, workers; credit `broadcast`) and *alone* may hold {LIMIT} tokens, *alone, roomy* {ROOMY}.",
        "Greedy accuracy on held-out questions in %, mean over seeds (lowest–highest), at equal numbers of sampled",
        "training tokens, those of filtered groups included; between two rounds of questions, on the straight line.",
        "*Cut off*: share of the last step's trajectories that the limit ended, by role.",
        "",
        f"| arm | seeds | {heads} | curve | 1, 2, 3 hops at the end | cut off |",
        f"|---|---|{'---|' * len(points)}---|---|---|",
    ]
    for arm in ARMS:
        runs = [line for line in lines if line.arm == arm.name]
        if runs:
            reads = [spread([read_at(run, tokens) for run in runs]) for tokens in points]
            hops = [f"{statistics.fmean(read_at(run, budget, str(count)) for run in runs):.0f}" for count in (1, 2, 3)]
            cut = [
                f"{role} {100 * statistics.fmean(run.truncated[role] for run in runs):.0f} %"
                for role in runs[0].truncated
            ]
            fine = [
                statistics.fmean(read_at(run, tokens) for run in runs) / 100 for tokens in np.linspace(0, budget, 21)
            ]
            cells = [arm.name, str(len(runs)), *reads, spark([0.0, 1.0, *fine])[2:], ", ".join(hops), ", ".join(cut)]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of every run (%(default)s)")
    parser.add_argument("--go", action="store_true", help="run what is not there yet")
    parser.add_argument("--lines", type=Path, default=LINES)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--quick", action="store_true", help="one arm of two steps, nothing kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.quick:
            once = play(ARMS[0], 0, QUICK, Path(scratch))
            print(page([once]))
            print_result({"runs": 1, "sampled_tokens": once.rounds[-1].sampled_tokens})
            return
        book = Book.open(options.lines, Line)
        missing = [(arm, seed) for seed in options.seeds for arm in ARMS if not book.has((arm.name, seed))]
        for arm, seed in missing:
            print(f"{'run' if options.go else 'to run'}: {arm.name}, seed {seed}", flush=True)
            if options.go:
                book.add(play(arm, seed, [f"run.steps={options.steps}"], Path(scratch) / f"{arm.name}-{seed}"))
        if book.lines:
            options.page.write_text(page(book.lines), encoding="utf-8")
    left: JsonValue = 0 if options.go else len(missing)
    print_result({"runs_kept": len(book.lines), "runs_left": left})


if __name__ == "__main__":
    main()
