"""Shows a run while it goes on: a live panel on a terminal, one line at a time elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import anyio
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from matpo.cli.lines import EvaluationLine, HubLine, TrainerLine
from matpo.config import Config
from matpo.folder import RunFolder
from matpo.metrics import read_metrics

REFRESH_S = 0.5
"""The figures come from files that other processes write; they are looked at this often."""
PLAIN_EVERY_S = 10.0
"""Without a terminal, a line is printed this often."""
SPARKS = "▁▂▃▄▅▆▇█"


class Display:
    """Reads metrics.jsonl as it grows and draws what it says."""

    def __init__(self, config: Config, folder: RunFolder, console: Console) -> None:
        self._config = config
        self._folder = folder
        self._console = console
        self._began = time.monotonic()
        self._offset = 0
        self._trainer: TrainerLine | None = None
        self._hub: HubLine | None = None
        self._rewards: list[float] = []
        self._evaluations: list[EvaluationLine] = []

    async def follow(self) -> None:
        """Draw until cancelled."""
        if self._console.is_terminal:
            with Live(self._panel(), console=self._console, refresh_per_second=4, transient=True) as live:
                while True:
                    self.read()
                    live.update(self._panel())
                    await anyio.sleep(REFRESH_S)
        due = 0.0
        while True:
            self._print_rounds(self.read())
            if time.monotonic() >= due:
                self._console.print(self.line(), highlight=False)
                due = time.monotonic() + PLAIN_EVERY_S
            await anyio.sleep(REFRESH_S)

    def read(self) -> list[EvaluationLine]:
        """Take in the lines that are new and return the evaluation rounds among them."""
        rounds = []
        for offset, line in read_metrics(self._folder.metrics, offset=self._offset):
            self._offset = offset
            match line["stage"]:
                case "trainer":
                    self._trainer = TrainerLine.model_validate(line)
                    self._rewards.append(self._trainer.reward_mean)
                case "hub":
                    self._hub = HubLine.model_validate(line)
                case "evaluation":
                    rounds.append(EvaluationLine.model_validate(line))
        self._evaluations += rounds
        return rounds

    def line(self) -> str:
        """The state of the run in one line."""
        parts = [f"{time.monotonic() - self._began:4.0f} s", self.stage()]
        if self._trainer is not None:
            step = self._trainer
            parts.append(f"step {step.step}/{self._config.run.steps}  reward {step.reward_mean:.2f}")
            parts.append(f"staleness {step.staleness_mean:.1f} (max {step.staleness_max})")
        if self._hub is not None:
            hub = self._hub
            parts.append(f"{hub.episodes_per_s:.0f} episodes/s  {hub.sampled_tokens_per_s:.0f} tokens/s")
            parts.append(_ledger(hub))
        return "  |  ".join(parts)

    def stage(self) -> str:
        """What the run is doing, in words."""
        if self._hub is None:
            return "starting: the learner and the actors load the model"
        if self._hub.evaluation in ("before", "after"):
            when = self._hub.evaluation
            return f"playing the held-out questions {when} training, {self._hub.evaluation_left} left"
        return "training" if self._hub.actors else "waiting for actors"

    def _print_rounds(self, rounds: list[EvaluationLine]) -> None:
        for one in rounds:
            self._console.print(f"      held-out questions: {_round_in_words(one)}", highlight=False)

    def _panel(self) -> Panel:
        rows = Table.grid(padding=(0, 2))
        rows.add_row("stage", self.stage())
        steps = self._config.run.steps
        step = self._trainer.step if self._trainer is not None else 0
        bar = ProgressBar(total=max(1, steps), completed=step, width=30)
        rows.add_row("steps", Group(Text(f"{step} of {steps}"), bar))
        if self._rewards:
            rows.add_row("reward", f"{self._rewards[-1]:.3f}  {spark(self._rewards[-60:])}")
        if self._trainer is not None:
            t = self._trainer
            rows.add_row("staleness", f"{t.staleness_mean:.1f} steps on average, {t.staleness_max} at most")
            rows.add_row("step time", f"wait {t.wait_s:.2f} s, train {t.step_s:.2f} s, publish {t.publish_s:.2f} s")
            rows.add_row("step work", _work(t))
            for role, words in roles_in_words(t):
                rows.add_row(role, words)
            for sign in t.vitals.signs:
                rows.add_row("warning", Text(sign, style="yellow"))
        if self._hub is not None:
            h = self._hub
            rows.add_row("playing", f"{h.actors} actors, {h.in_flight} episodes")
            rows.add_row("rate", f"{h.episodes_per_s:.1f} episodes/s, {h.sampled_tokens_per_s:.0f} sampled tokens/s")
            rows.add_row("ledger", _ledger(h))
            for wait in h.waits:
                if wait.since_s > wait.limit_s:
                    rows.add_row("stall", f"{wait.who} waits for {wait.what} ({wait.since_s:.0f} s): {wait.remedy}")
        for one in self._evaluations[-6:]:
            rows.add_row("held out", _round_in_words(one))
        elapsed = time.monotonic() - self._began
        return Panel(rows, title=f"matpo · {self._config.run.name} · {elapsed:.0f} s", border_style="cyan")


def spark(values: list[float]) -> str:
    """A line of bars from the smallest to the largest value."""
    low, high = min(values), max(values)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((value - low) * scale)] for value in values)


def share(value: float | None) -> str:
    """A share as a percentage; a dash where there is none."""
    return "–" if value is None else f"{100 * value:.0f} %"


def _ledger(hub: HubLine) -> str:
    return f"{hub.ledger.trained} trained, {hub.ledger.filtered} filtered, {hub.ledger.pending} pending"


def _work(step: TrainerLine) -> str:
    """What sharing prefixes saved, and the memory the step took."""
    if not step.flops:
        return "nothing to train on"
    packed, padded = step.packed_flops / step.flops, step.padded_flops / step.flops
    return (
        f"{step.tokens} tokens as {step.unique_tokens}: {packed:.1f} times less arithmetic than packed,"
        f" {padded:.1f} than padded; peak {step.peak_bytes / 1e9:.1f} GB"
    )


def roles_in_words(step: TrainerLine) -> Iterator[tuple[str, str]]:
    """Every trained role and its figures."""
    whole = sum(one.gradient or 0.0 for one in step.roles.values())
    for role, one in step.roles.items():
        play = step.role_plays[role]
        words = [
            f"{share((one.gradient or 0.0) / whole if whole else None)} of the gradient",
            f"mismatch KL {_figure(one.mismatch_kl)}",
            f"advantage {_figure(one.advantage_mean)} ± {_figure(_root(one.advantage_variance))}",
            f"staleness {play.staleness_mean:.1f}",
            f"{share(play.truncated)} cut short",
        ]
        if play.free_riding is not None:
            words.append(f"{share(play.free_riding)} ride free")
        yield role, ", ".join(words)


def _root(variance: float | None) -> float | None:
    return None if variance is None else math.sqrt(variance)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def _round_in_words(one: EvaluationLine) -> str:
    hops = ", ".join(f"{hop}-hop {share(value)}" for hop, value in sorted(one.accuracy_by_hops.items()))
    return (
        f"after step {one.step}: {share(one.accuracy)} right of {one.questions} ({hops}), reading {share(one.reading)}"
    )
