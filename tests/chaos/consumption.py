"""Was any episode lost or trained twice? Decided from the trainer's own log and raw rows, without the ledger's code.

The log (RUN/consumed.jsonl, see `learner.trainer.consumed`) is written before the hub hears of a step. Replaying its
lines gives, for the weights that survive, which step consumed which tree; the journal must say the same.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Consumption:
    """What the surviving weights were made of."""

    step: int
    """Steps taken, all of them in the log."""
    trained: dict[str, int]
    """Tree → the step that trained on it."""
    filtered: dict[str, int]
    """Tree → the step whose trainer left it out."""
    doubled: tuple[str, ...]
    """Trees in more than one surviving step, or twice in one."""


@dataclass(frozen=True)
class Verdict:
    """Empty lists are what is promised."""

    steps: int
    trained: int
    doubled: tuple[str, ...]
    """Consumed more than once by the surviving weights."""
    lost: tuple[str, ...]
    """Acknowledged to an actor, and neither in the journal nor in what the weights consumed."""
    disagree: tuple[str, ...]
    """Trees of which the journal says something else than the trainer."""

    @property
    def clean(self) -> bool:
        return not (self.doubled or self.lost or self.disagree)


def read_consumption(log: Path) -> Consumption:
    """Follow the log: a start at step s makes every later step before it void. Fails on a step that is missing."""
    steps: dict[int, dict[str, list[str]]] = {}
    for text in log.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if line["event"] == "start":
            steps = {step: taken for step, taken in steps.items() if step <= line["step"]}
            assert len(steps) == line["step"], f"a trainer began at step {line['step']} of which there is no record"
        else:
            assert line["step"] == len(steps) + 1, f"step {line['step']} follows step {len(steps)} in the log"
            steps[line["step"]] = {"trained": line["trained"], "filtered": [tree for tree, _ in line["filtered"]]}
    seen: set[str] = set()
    doubled = []
    for taken in steps.values():
        for tree in (*taken["trained"], *taken["filtered"]):
            if tree in seen:
                doubled.append(tree)
            seen.add(tree)
    return Consumption(
        step=len(steps),
        trained={tree: step for step, taken in steps.items() for tree in taken["trained"]},
        filtered={tree: step for step, taken in steps.items() for tree in taken["filtered"]},
        doubled=tuple(doubled),
    )


def judge(run: Path, acknowledged: Iterable[str] = ()) -> Verdict:
    """Compare the log of a run that stands still with its journal (and archive).

    `acknowledged`: ids of trees that actors were told are safe, as far as the caller has noted them.
    """
    found = read_consumption(run / "consumed.jsonl")
    rows, settled = journal_rows(run)
    disagree = set()
    for tree, (state, step) in rows.items():
        consumed_at = found.trained.get(tree) if state == "trained" else found.filtered.get(tree)
        if state == "trained" and consumed_at != step:
            disagree.add(tree)
        if state == "pending" and (tree in found.trained or tree in found.filtered):
            disagree.add(tree)
        if state in ("filtered", "evaluation") and tree in found.trained:
            disagree.add(tree)
    consumed = found.trained | found.filtered
    # What has left the journal for good is known by the trainer's record alone.
    disagree |= {tree for tree, step in consumed.items() if tree not in rows and step > settled}
    lost = {tree for tree in acknowledged if tree not in rows and tree not in consumed}
    return Verdict(
        steps=found.step,
        trained=len(found.trained),
        doubled=found.doubled,
        lost=tuple(sorted(lost)),
        disagree=tuple(sorted(disagree)),
    )


def journal_rows(run: Path) -> tuple[dict[str, tuple[str, int | None]], int]:
    """State and step of every tree in journal and archive, and the step up to which trees may be gone."""
    rows: dict[str, tuple[str, int | None]] = {}
    settled = 0
    for name in ("archive.sqlite", "journal.sqlite"):
        if not (run / name).is_file():
            continue
        with contextlib.closing(sqlite3.connect(f"file:{run / name}?mode=ro", uri=True)) as database:
            rows |= {
                tree: (state, step) for tree, state, step in database.execute("SELECT tree_id, state, step FROM trees")
            }
            meta = database.execute("SELECT value FROM meta WHERE key = 'settled'").fetchone()
            settled = json.loads(meta[0])["upto_step"] if meta is not None else settled
    return rows, settled


if __name__ == "__main__":
    verdict = judge(Path(sys.argv[1]))
    sys.stdout.write(json.dumps(asdict(verdict)) + "\n")
    sys.exit(0 if verdict.clean else 1)
