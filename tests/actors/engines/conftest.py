"""The engines every contract test runs against."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray

from actors.engines.embedded.decoder import Decoder
from actors.engines.embedded.parameters import Parameters
from actors.engines.embedded.players import Players
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
            return Players.open(folder, self.settings, lora=self.lora, seed=1)
        assert self.server is not None
        settings = self.settings.model_copy(update={"urls": (self.server.url(folder, self.lora),)})
        return SglangEngine.open(folder, settings, lora=self.lora, seed=1, log=folder / "engine.log")

    @property
    def resumes(self) -> bool:
        """Whether a request survives the engine's death; else it fails, and its caller tries again."""
        return isinstance(self.settings, SglangSettings)

    @asynccontextmanager
    async def mortal(self, folder: Path) -> AsyncIterator[tuple[Engine, Callable[[], None]]]:
        """An engine of its own, and what makes it die."""
        if isinstance(self.settings, EmbeddedSettings):
            with breakable_device() as break_it:
                async with self(folder) as engine:
                    yield engine, break_it
            return
        assert self.server is not None
        self.server.stop()
        settings = self.settings.model_copy(update={"python": str(PYTHON), "max_batch": 4})
        async with SglangEngine.open(folder, settings, seed=0, log=folder / "log") as started:
            yield started, kill_server

    def using(self, **options: str | int) -> OpenEngine:
        """The same with other settings."""
        return replace(self, settings=self.settings.model_copy(update=options))

    def adapted(self, lora: Lora) -> OpenEngine:
        """The same, sampling with adapters."""
        return replace(self, lora=lora)


@contextmanager
def breakable_device() -> Iterator[Callable[[], None]]:
    """When told to, the embedded engine's next decoding step fails as on a device that is lost."""
    plain, told = Decoder.decode, threading.Event()

    def decode(
        self: Decoder, parameters: Parameters, tokens: NDArray[np.int32], positions: NDArray[np.int64]
    ) -> torch.Tensor:
        if told.is_set():
            told.clear()
            raise RuntimeError("the device is lost")
        return plain(self, parameters, tokens, positions)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "decode", decode)
        yield told.set


def kill_server() -> None:
    """As the system does to a process that takes too much memory."""
    leashes = [p for p in psutil.Process().children() if "actors.engines.sglang.leash" in p.cmdline()]
    assert len(leashes) == 1
    leashes[0].children()[0].kill()


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


CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=CUDA)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the embedded engine runs."""
    return str(request.param)


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=CUDA), pytest.param("sglang", marks=pytest.mark.sglang)],
    ids=["embedded", "embedded-cuda", "sglang"],
)
def open_engine(request: pytest.FixtureRequest) -> OpenEngine:
    """Each kind of engine in turn. A new kind joins here."""
    if request.param != "sglang":
        return OpenEngine(EmbeddedSettings(device=request.param, max_batch=ROWS, max_context_tokens=CONTEXT))
    opened: OpenEngine = request.getfixturevalue("open_sglang")
    return opened
