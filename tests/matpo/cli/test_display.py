"""What the display says of a run's figures."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from matpo.cli.display import Display
from matpo.folder import RunFolder
from matpo.metrics import MetricsFile
from protocols.records import Record
from tests.learner.trainer.test_step import config_with


class Line(Record):
    """As the trainer writes it, abridged."""

    step: int = 3
    reward_mean: float = 0.5
    staleness_mean: float = 0.0
    staleness_max: int = 0
    wait_s: float = 0.0
    step_s: float = 1.0
    publish_s: float = 0.0
    tokens: int = 900
    unique_tokens: int = 300
    flops: int = 100
    packed_flops: int = 250
    padded_flops: int = 400
    peak_bytes: int = 2_500_000_000


def shown(tmp_path: Path, line: Line) -> str:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append("trainer", line)
    metrics.close()
    console = Console(width=200, record=True, quiet=True)
    display = Display(config_with(), RunFolder(tmp_path), console)
    display.read()
    with console.capture() as capture:
        console.quiet = False
        console.print(display._panel())
    return capture.get()


def test_the_panel_says_what_sharing_saved_and_the_memory_it_took(tmp_path: Path) -> None:
    text = shown(tmp_path, Line())
    assert "900 tokens as 300: 2.5 times less arithmetic than packed, 4.0 than padded; peak 2.5 GB" in text


def test_a_step_without_samples_has_no_ratio_to_show(tmp_path: Path) -> None:
    assert "nothing to train on" in shown(tmp_path, Line(tokens=0, unique_tokens=0, flops=0))
