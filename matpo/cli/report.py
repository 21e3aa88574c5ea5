"""What `matpo run` says at the end: the figures, one question's tree before and after, and where to look next."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from matpo.cli.children import shown_path
from matpo.cli.display import share
from matpo.cli.lines import Change, SummaryFile, TracedTrajectory, TraceFile
from matpo.folder import RunFolder

STYLES = {"sampled": "bold", "tool_result": "dim", "worker_report": "green", "instruction": "dim italic"}


def print_report(console: Console, folder: RunFolder, *, seconds: float) -> None:
    """Print everything a finished run has to say."""
    summary = SummaryFile.model_validate_json(folder.summary.read_bytes())
    console.print(figures(summary, seconds=seconds))
    traces = {name: folder.trace(name) for name in ("before", "after")}
    if all(path.is_file() for path in traces.values()):
        shown = {name: TraceFile.model_validate_json(path.read_bytes()) for name, path in traces.items()}
        width = max(40, (console.width - 3) // 2)
        console.print(Columns([_episode(name, one, width) for name, one in shown.items()], padding=(0, 1)))
    path = shown_path(folder.path)
    console.print(f"next: matpo doctor {path}   the ledger, and who waited on whom")
    console.print(f"      matpo replay {path}   train again from the journal alone: the same weights, bit for bit")
    console.print(f"      {path}/metrics.jsonl, logs/, traces/, checkpoints/   everything else")


def figures(summary: SummaryFile, *, seconds: float) -> Table:
    """Before and after, then how the run went."""
    table = Table(title=f"{summary.steps} steps in {seconds:.0f} s", title_justify="left")
    table.add_column("held-out questions, greedy")
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right")
    _add(table, "right answers", summary.accuracy)
    for hops, change in sorted(summary.accuracy_by_hops.items()):
        _add(table, f"  {hops} hop{'s' if hops != '1' else ''}", change)
    _add(table, "format", summary.format)
    _add(table, "reading (right fact not the first hit)", summary.reading)
    table.add_section()
    age = "–" if summary.staleness_mean is None else f"{summary.staleness_mean:.1f} mean, {summary.staleness_max} max"
    ledger = summary.ledger
    sums = (
        f"{ledger.trained} trained, {ledger.filtered} filtered, {ledger.pending} pending, {ledger.evaluation} held out"
    )
    swaps = summary.swaps
    paused = (
        "–"
        if swaps is None
        else (
            f"{swaps.count}, pause {1000 * swaps.pause_median_s:.0f} ms median, {1000 * swaps.pause_max_s:.0f} ms max"
        )
    )
    for name, value in (
        ("episodes", f"{summary.episodes} ({summary.episodes_per_s:.1f}/s)"),
        ("sampled tokens", f"{summary.sampled_tokens_per_s:.0f}/s"),
        ("staleness, steps", age),
        ("weight swaps", paused),
        ("groups all wrong / all right", f"{share(summary.all_fail_fraction)} / {share(summary.all_pass_fraction)}"),
        ("ledger", sums if summary.ledger_adds_up else f"DOES NOT ADD UP: {sums}"),
    ):
        table.add_row(name, "", "", value)
    return table


def _add(table: Table, name: str, change: Change) -> None:
    gain = None if change.before is None or change.after is None else change.after - change.before
    table.add_row(
        name, share(change.before), share(change.after), "–" if gain is None else f"{round(100 * gain):+d} points"
    )


def _episode(name: str, trace: TraceFile, width: int) -> Panel:
    root = Tree(Text(trace.question, style="italic"))
    for index in _children(trace.trajectories, None):
        _grow(root, index, trace.trajectories)
    reward = trace.rewards.get("total")
    verdict = "not scored" if reward is None else f"reward {reward:.2f}, right answer {' or '.join(trace.answers)}"
    return Panel(root, title=f"{name} training", subtitle=verdict, width=width)


def _grow(node: Tree, index: int, trajectories: tuple[TracedTrajectory, ...]) -> None:
    """Show a trajectory's turns, each followed by the trajectories it started."""
    for number, turn in enumerate(trajectories[index].turns):
        words = plain(turn.text or "")
        if turn.kind != "prompt" and words:
            label = trajectories[index].role if turn.kind == "sampled" else turn.kind.replace("_", " ")
            branch = node.add(Text.assemble((f"{label}: ", "cyan"), (words, STYLES.get(turn.kind, ""))))
            for child in _children(trajectories, (index, number)):
                _grow(branch, child, trajectories)


def _children(trajectories: tuple[TracedTrajectory, ...], parent: tuple[int, int] | None) -> Iterator[int]:
    return (index for index, one in enumerate(trajectories) if one.parent == parent)


def plain(text: str) -> str:
    """A turn as people read it: without control tokens, calls as name(argument)."""
    text = re.sub(r"<\|im_start\|>\s*\w+|<\|\s*\w+\s*\|>", " ", text)
    text = re.sub(
        r'<tool_call>\s*\{"name":\s*"(\w+)",\s*"arguments":\s*\{"\w+":\s*"([^"]*)"\}\}\s*</tool_call>',
        lambda call: f"{call[1]}({call[2].strip()})",
        text,
    )
    return " ".join(text.split())
