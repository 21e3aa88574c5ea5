"""The quick start under a thousand faults: is anything lost, is anything trained twice, does it still learn?

`python -m benchmarks.chaos [--faults 1000] [--minutes 45] [--seed 6] [--quick]`. Kills and freezes actors (with their
engine), hub, trainer, tool servers, the learner and `matpo run` itself, cuts and slows links and fills disks, by a
schedule that the seed decides, several at a time (`tests/chaos`). Afterwards every tree and task is accounted for by
the ledger, and again, without it, from the trainer's own record of what it consumed and from what was seen meanwhile.
The run learns if the mean reward of the last tenth of its steps is above that of the first. Writes `--out` and, beside
it, a readable table; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import signal
import tempfile
from pathlib import Path

import anyio
import orjson
from rich.console import Console

from benchmarks.runs import ROOT, print_result
from tests.chaos.job import Settings
from tests.chaos.play import ChaosReport, play, say_on_stderr
from tests.end_to_end.processes import SMALL

CONFIG = ROOT / "configs" / "quickstart.toml"
RESULTS = ROOT / "docs" / "results" / "chaos.json"
PAGE_MARK = "<!-- recovery: below this line by benchmarks/recovery.py -->"
OVERRIDES = ("evaluation.questions=64", "evaluation.every_steps=0", "actor.concurrency=32")
QUICK_FAULTS, QUICK_MINUTES = 8, 0.2


def page(report: ChaosReport) -> str:
    """The report for people, in Markdown."""
    r = report
    rows = [
        ("trees lost", f"**{r.lost}** of {r.promised} that somebody was promised"),
        ("trees trained twice", f"**{r.doubled}**"),
        ("trees", f"{r.trained} trained, {r.filtered} filtered, {r.pending} pending"),
        (
            "tasks",
            f"{r.tasks} begun = {r.tasks_trained} trained + {r.tasks_filtered} filtered + {r.tasks_pending} pending",
        ),
        ("ledger", "adds up" if r.adds_up else "**does not add up**"),
        (
            "steps",
            f"{r.steps} that stand, {r.steps_undone} taken again ({r.lineages} starts of a trainer)",
        ),
        ("mean reward", f"{r.reward_first:.2f} in the first tenth of the steps, {r.reward_last:.2f} in the last"),
        ("`matpo run` started again", f"{r.resumed} times"),
        ("time", f"{r.seconds / 60:.0f} minutes"),
    ]
    kinds = "\n".join(f"| {kind} | {count} |" for kind, count in r.by_kind.items())
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        f"# {r.faults} faults\n\n"
        f"`python -m benchmarks.chaos --faults {r.faults} --seed {r.seed}`: the quick start with three actors, two of"
        " them on links and\ndisks of their own. How it is counted: [reliability](../reliability.md).\n\n"
        f"| | |\n|---|---|\n{table}\n\n| fault | times |\n|---|---|\n{kinds}\n"
    )


def write(report: ChaosReport, out: Path) -> None:
    """`out` and the page beside it; what another benchmark wrote below its mark stays."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(orjson.dumps(report.model_dump(mode="json"), option=orjson.OPT_INDENT_2) + b"\n")
    text = out.with_suffix(".md")
    rest = text.read_text(encoding="utf-8").partition(PAGE_MARK) if text.is_file() else ("", "", "")
    text.write_text(page(report) + (f"\n{rest[1]}{rest[2]}" if rest[1] else ""), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=45.0, help="the faults are spread over so long")
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--quick", action="store_true", help="a few faults, under a minute: shows the plumbing")
    parser.add_argument("--dir", type=Path, help="keep the run here")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    # Whoever ends it, also in the background of a script, leaves no process and no file system behind.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    with tempfile.TemporaryDirectory() as scratch:

        async def one() -> ChaosReport:
            return await play(
                options.dir or Path(scratch) / "chaos",
                Settings(CONFIG, SMALL if options.quick else OVERRIDES),
                seed=options.seed,
                faults=QUICK_FAULTS if options.quick else options.faults,
                seconds=60 * (QUICK_MINUTES if options.quick else options.minutes),
                rare=not options.quick,
                say=say_on_stderr,
            )

        report = anyio.run(one)
    if not options.quick:
        write(report, options.out)
    Console(width=120).print(page(report), markup=False)
    print_result(report.model_dump(mode="json"))


if __name__ == "__main__":
    main()
