"""The shipped config files: each loads, and is short enough to be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from matpo.load import load_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_loads_and_fits_a_screen(path: Path) -> None:
    load_config(path)
    assert len(path.read_text().splitlines()) < 60
