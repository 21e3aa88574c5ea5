"""docs/recipes.md and the shipped configs: every file that is named exists, and everything loads."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from matpo.load import load_config

ROOT = Path(__file__).resolve().parent.parent
RECIPES = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
ROWS = [line.split(" | ") for line in RECIPES.splitlines() if "`configs/" in line and line.startswith("| ")]
CONFIGS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.toml"))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_shipped_config_loads(config: Path) -> None:
    load_config(ROOT / config)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip("| "))
def test_a_recipe_is_the_topology_the_credit_and_the_objective_its_row_says(row: list[str]) -> None:
    _, topology, credit, objective, _, command = row
    file, *overrides = shlex.split(command.strip("` |"))
    config = load_config(ROOT / file, overrides)
    told = [re.match(r"`(\w+)`", cell.strip()) for cell in (topology, credit, objective)]
    assert [match and match[1] for match in told] == [
        config.episode.workflow.kind,
        config.learner.credit.name,
        config.learner.objective.name,
    ]


def test_the_systems_the_library_was_built_for_are_among_the_recipes() -> None:
    named = {system.removeprefix("| ").split("**")[1] for system, *_ in ROWS if "**" in system}
    assert named >= {"MATPO", "MAGRPO", "MALT", "MAPoRL", "MLPO", "SWEET-RL", "Dr. MAS", "AT-GRPO", "RAO", "C3"}


def test_every_config_of_a_published_system_has_a_recipe() -> None:
    shipped = {path.name for path in CONFIGS if len(path.parts) == 2}
    ours = {name for name in shipped if name.startswith(("quickstart", "smollm2"))}
    assert shipped - ours == {name for *_, command in ROWS for name in re.findall(r"configs/(\w+\.toml)", command)}
