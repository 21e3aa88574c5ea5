"""The engines every contract test runs against."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from actors.engines.embedded.engine import EmbeddedEngine
from actors.engines.engine import Engine
from matpo.config import EmbeddedEngine as EmbeddedSettings

CONTEXT = 96
OpenEngine = Callable[[Path], AbstractAsyncContextManager[Engine]]


@pytest.fixture(params=["embedded"])
def open_engine(request: pytest.FixtureRequest) -> OpenEngine:
    """Opens an engine with 8 rows and a context of 96 tokens on a model folder. A new kind of engine joins here."""
    assert request.param == "embedded"
    settings = EmbeddedSettings(max_batch=8, max_context_tokens=CONTEXT)
    return lambda folder: EmbeddedEngine.open(folder, settings, seed=1)
