"""The configured engine is opened, and what it lacks is named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from actors.engines import opening
from actors.engines.embedded.engine import EmbeddedEngine
from actors.engines.opening import open_engine
from matpo.config import EmbeddedEngine as Settings
from matpo.errors import UserError
from tests.actors.engines.models import make_model


async def test_the_engine_of_the_configured_kind_is_opened(tmp_path: Path) -> None:
    make_model("qwen3", tmp_path)
    async with open_engine(tmp_path, Settings(max_context_tokens=64), seed=0) as engine:
        assert isinstance(engine, EmbeddedEngine)


def test_a_library_that_is_not_installed_is_named_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: Mapping[str, tuple[str, str, str]] = {"embedded": ("no_such_library", "E", "pip install 'matpo[torch]'")}
    monkeypatch.setattr(opening, "KINDS", kinds)
    with pytest.raises(UserError, match=r"'no_such_library'; run pip install 'matpo\[torch\]'"):
        open_engine(tmp_path, Settings(), seed=0)
