"""What the display says of a run's figures."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from rich.console import Console

from matpo.cli.display import Display
from matpo.collapse import Vitals
from matpo.diagnostics import RolePlay
from matpo.folder import RunFolder
from matpo.metrics import MetricsFile
from matpo.objective.report import PolicyReport
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
    roles: dict[str, PolicyReport] = Field(default={})
    role_plays: dict[str, RolePlay] = Field(default={})
    vitals: Vitals = Vitals(step=3, mismatch_kl=0.0, entropy=1.0, truncated=0.0, gradient_cosine=None)


def moved(gradient: float) -> PolicyReport:
    figures = dict.fromkeys(PolicyReport.model_fields, 0.01) | {"tokens": 9, "gradient": gradient}
    return PolicyReport.model_validate(figures | {"advantage_mean": 0.5, "advantage_variance": 4.0})


def played(free_riding: float | None) -> RolePlay:
    return RolePlay(
        trajectories=8,
        truncated=0.25,
        staleness_mean=1.25,
        staleness_max=3,
        free_riding=free_riding,
        reward_explained=None,
    )


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


def test_every_role_has_its_figures_and_a_sign_of_collapse_is_shown(tmp_path: Path) -> None:
    line = Line(
        roles={"planner": moved(3.0), "worker": moved(1.0)},
        role_plays={"planner": played(None), "worker": played(0.5)},
        vitals=Vitals(
            step=3, mismatch_kl=1.0, entropy=1.0, truncated=0.0, gradient_cosine=None, signs=("mismatch KL 1 is above",)
        ),
    )
    text = shown(tmp_path, line)
    figures = "of the gradient, mismatch KL 0.01, advantage 0.5 ± 2, staleness 1.2, 25 % cut short"
    assert f"75 % {figures} " in text
    assert f"25 % {figures}, 50 % ride free" in text
    assert "mismatch KL 1 is above" in text
