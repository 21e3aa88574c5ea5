"""The engines every contract test runs against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from actors.engines.embedded.engine import EmbeddedEngine
from actors.engines.engine import Engine
from actors.engines.sglang.engine import SglangEngine
from matpo.config import EmbeddedEngine as EmbeddedSettings
from matpo.config import Lora
from matpo.config import SglangEngine as SglangSettings
from tests.actors.engines.servers import PYTHON, SharedServer

ROWS, CONTEXT = 8, 96


@dataclass(frozen=True)
class OpenEngine:
    """Opens an engine with 8 rows and a context of 96 tokens on a model folder."""

    settings: EmbeddedSettings | SglangSettings
    server: SharedServer | None = None
    lora: Lora | None = None

    @property
    def recomputes(self) -> bool:
        """Whether a swap recomputes the keys and values of running requests with the new weights."""
        return isinstance(self.settings, SglangSettings) and self.settings.swap != "in_place"

    def __call__(self, folder: Path) -> AbstractAsyncContextManager[Engine]:
        if isinstance(self.settings, EmbeddedSettings):
            return EmbeddedEngine.open(folder, self.settings, lora=self.lora, seed=1)
        assert self.server is not None
        settings = self.settings.model_copy(update={"urls": (self.server.url(folder, self.lora),)})
        return SglangEngine.open(folder, settings, lora=self.lora, seed=1, log=folder / "engine.log")

    def using(self, **options: str | int) -> OpenEngine:
        """The same with other settings."""
        return replace(self, settings=self.settings.model_copy(update=options))

    def adapted(self, lora: Lora) -> OpenEngine:
        """The same, sampling with adapters."""
        return replace(self, lora=lora)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedServer]:
    """The real SGLang of `make sglang-cpu`."""
    if not PYTHON.is_file():
        pytest.fail(f"{PYTHON} does not exist; run `make sglang-cpu`")
    shared = SharedServer(tmp_path_factory.mktemp("sglang"), rows=ROWS, context=CONTEXT)
    yield shared
    shared.stop()


@pytest.fixture
def open_sglang(server: SharedServer) -> OpenEngine:
    """SGLang alone, with replies token by token."""
    settings = SglangSettings(device="cpu", dtype="float32", max_context_tokens=CONTEXT, stream_tokens=1)
    return OpenEngine(settings, server)


@pytest.fixture(params=["embedded", pytest.param("sglang", marks=pytest.mark.sglang)])
def open_engine(request: pytest.FixtureRequest) -> OpenEngine:
    """Each kind of engine in turn. A new kind joins here."""
    if request.param == "embedded":
        return OpenEngine(EmbeddedSettings(max_batch=ROWS, max_context_tokens=CONTEXT))
    opened: OpenEngine = request.getfixturevalue("open_sglang")
    return opened
