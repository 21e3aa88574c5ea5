"""`matpo doctor RUN`: the ledger and whether it adds up, who waits on whom since when, and the staleness forecast.

Reads a live run or a dead run's folder and changes nothing. Exit codes: 0 in order, 1 the ledger does not add up,
2 something to fix.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.table import Table

from learner.hub.bias import audit_journal
from learner.hub.figures import read_figures
from learner.hub.journal import Journal, JournalUnreadable
from learner.hub.ledger import Check, Ledger, checks, read_ledger
from matpo.config import Config
from matpo.errors import UserError, run_command
from matpo.folder import HubAddress, RunFolder
from matpo.freshness import Forecast, forecast
from matpo.length_bias import REMEDY, BiasAudit
from matpo.load import load_config
from matpo.metrics import read_metrics
from matpo.tool_figures import ActorFigures, ToolFigures, together
from matpo.waits import WaitBook, waiting
from protocols.messages import Wait
from protocols.records import Record

TAIL_BYTES = 2**20
SILENT_HEARTBEATS = 5
"""A hub that wrote no status for so many heartbeats is reported as frozen."""


class LastStatus(BaseModel):
    """What the doctor reads of the hub's last line in metrics.jsonl."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    time: float
    """Unix time."""
    waits: tuple[Wait, ...]
    refused: dict[str, int]


class Report(Record):
    """Everything the doctor found; `--json` prints it."""

    run: str
    state: str
    """live, complete or dead."""
    hub_pid: int | None
    step: int
    steps: int
    status_age_s: float | None
    """Seconds since the hub last wrote its status."""
    ledger: Ledger
    checks: tuple[Check, ...]
    adds_up: bool
    waits: tuple[Wait, ...]
    """As of the hub's last status; a live run's are brought up to now, a dead run's are those it died with."""
    stalls: int
    """Waits beyond their limit."""
    staleness_mean: float | None
    staleness_max: int | None
    refused: dict[str, int]
    bias: BiasAudit
    """Whether long or hard episodes are missing from what is trained on."""
    tools: tuple[ToolFigures, ...]
    """Of all actors together, as far as they write into this folder."""
    forecast: Forecast


def examine(folder: RunFolder, *, now: float) -> Report:
    """Read a run's folder at Unix time `now`. Raises `UserError` where there is nothing to read."""
    config = load_config(folder.config)
    try:
        with Journal.open_read_only(folder.journal) as journal, journal.snapshot():
            ledger, sums = read_ledger(journal), tuple(checks(journal))
            step = journal.number("SELECT MAX(step) FROM steps WHERE undone = 0")
            consumed, bias = read_figures(journal, first=1, last=step), audit_journal(journal)
    except JournalUnreadable as error:
        raise UserError(str(error)) from error
    address, (status, actors) = folder.hub_address(), last_lines(folder)
    state = "live" if address is not None else "complete" if folder.summary.is_file() else "dead"
    waits = () if state == "complete" or status is None else status.waits
    age_s = None if status is None else round(max(0.0, now - status.time), 1)
    if address is not None:
        waits = brought_up_to_now(waits, age_s or 0.0, config, address)
    return Report(
        run=folder.path.name,
        state=state,
        hub_pid=None if address is None else address.pid,
        step=step,
        steps=config.run.steps,
        status_age_s=age_s,
        ledger=ledger,
        checks=sums,
        adds_up=all(check.holds for check in sums),
        waits=waits,
        stalls=sum(wait.since_s > wait.limit_s for wait in waits),
        staleness_mean=consumed.staleness_mean,
        staleness_max=consumed.staleness_max,
        refused={} if status is None else status.refused,
        bias=bias,
        tools=tuple(figures for figures in together(actors) if figures.calls),
        forecast=expected(config),
    )


def brought_up_to_now(waits: Sequence[Wait], age_s: float, config: Config, hub: HubAddress) -> tuple[Wait, ...]:
    """The waits of a live run, grown since its hub wrote them; a hub that writes no more is itself waited for."""
    grown = tuple(wait.model_copy(update={"since_s": round(wait.since_s + age_s, 1)}) for wait in waits)
    if age_s <= SILENT_HEARTBEATS * config.hub.heartbeat_s:
        return grown
    frozen = WaitBook("everybody").update([waiting("hub_status", since_s=-age_s, pid=hub.pid)], 0.0)
    return (*frozen, *grown)


def expected(config: Config) -> Forecast:
    """The forecast for a configuration when all its actors are full."""
    return forecast(
        in_flight=config.actor.count * config.actor.concurrency,
        trees_per_step=config.learner.trees_per_step,
        eta=config.freshness.eta,
    )


def last_lines(folder: RunFolder) -> tuple[LastStatus | None, Collection[ActorFigures]]:
    """The last lines of the hub and of each actor in metrics.jsonl, looked for in its last `TAIL_BYTES`."""
    found, actors, start = None, dict[str, ActorFigures](), 0
    size = folder.metrics.stat().st_size if folder.metrics.is_file() else 0
    if size > TAIL_BYTES:
        with folder.metrics.open("rb") as file:
            file.seek(size - TAIL_BYTES)
            start = size - TAIL_BYTES + len(file.readline())
    try:
        for _, line in read_metrics(folder.metrics, offset=start):
            if line["stage"] == "hub":
                found = LastStatus.model_validate(line)
            elif line["stage"] == "actor":
                figures = ActorFigures.model_validate({k: v for k, v in line.items() if k not in ("time", "stage")})
                actors[figures.actor_id] = figures
    except ValidationError as error:
        raise UserError(f"{folder.metrics} was written by another version of matpo; use that one") from error
    return found, actors.values()


def show(report: Report, console: Console) -> None:
    """Print a report for people."""
    where = f"hub process {report.hub_pid}" if report.hub_pid is not None else "no hub process"
    console.print(f"run [bold]{report.run}[/bold]: {report.state}, step {report.step} of {report.steps}, {where}")
    ledger = report.ledger
    by_reason = ", ".join(f"{count} {reason}" for reason, count in ledger.filtered_by.items())
    table = Table("ledger", "trees", title=None)
    table.add_row("acknowledged", str(ledger.trees))
    table.add_row("  pending", str(ledger.pending))
    table.add_row("  trained", str(ledger.trained))
    table.add_row("  filtered", f"{ledger.filtered}" + (f" ({by_reason})" if by_reason else ""))
    table.add_row("  evaluation", str(ledger.evaluation))
    console.print(table)
    console.print(
        f"tasks: {ledger.tasks} started = {ledger.tasks_open} open + {ledger.tasks_complete} complete"
        f" + {ledger.tasks_trained} trained + {ledger.tasks_filtered} filtered; episodes:"
        f" {ledger.episodes_leased} leased ({ledger.leases_live} leases), {ledger.episodes_waiting} waiting,"
        f" {ledger.episodes_abandoned} given up"
    )
    if ledger.settled:
        console.print(
            f"{ledger.settled} of these trees have left the journal (hub.keep_trained); {ledger.late} came later"
        )
    for check in report.checks:
        if not check.holds:
            console.print(f"[bold red]DOES NOT ADD UP[/bold red]  {check.name}: {check.left} is not {check.right}")
    if report.adds_up:
        console.print(f"[green]the ledger adds up[/green] ({len(report.checks)} sums)")
    for wait in report.waits:
        mark = "[bold red]STALL[/bold red] " if wait.since_s > wait.limit_s else ""
        verb = "waits" if report.state == "live" else "waited"
        console.print(f"{mark}{wait.who} {verb} {wait.since_s:.0f} s for {wait.what}: {wait.remedy}")
    if not report.waits and report.state == "live":
        console.print("nobody waits")
    if report.refused:
        console.print("refused messages: " + ", ".join(f"{count} {name}" for name, count in report.refused.items()))
    if report.tools:
        console.print(_tools(report.tools))
    for alarm in report.bias.alarms:
        console.print(f"[bold red]LENGTH BIAS[/bold red] {alarm}")
    if report.bias.alarms:
        console.print(f"  {REMEDY}")
    if report.staleness_mean is not None:
        console.print(f"staleness: {report.staleness_mean:.2f} steps on average, {report.staleness_max} at most")
    console.print(f"forecast: {report.forecast.advice}")


def _tools(tools: Sequence[ToolFigures]) -> Table:
    table = Table("tool", "calls", "model's errors", "outages", "p50 ms", "p99 ms")
    for t in tools:
        counts = (str(t.calls), str(t.model_errors), str(t.infrastructure_errors))
        table.add_row(t.tool, *counts, f"{t.p50_ms:.1f}", f"{t.p99_ms:.1f}")
    return table


def run(arguments: Sequence[str]) -> int:
    """Entry point of `python -m learner.doctor`."""
    parser = argparse.ArgumentParser(prog="matpo doctor", description="What a run does, waits for, and has counted.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    report = examine(RunFolder.existing(options.run), now=time.time())
    if options.json:
        print(json.dumps(report.model_dump(mode="json")))
    else:
        show(report, Console(highlight=False, soft_wrap=True))
    if not report.adds_up:
        sys.stderr.write(f"error: the ledger of run {str(options.run)!r} does not add up; please report this\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: run(sys.argv[1:])))
