"""Opens the configured engine, and imports only that one: an actor that drives SGLang installs without torch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from importlib import import_module
from pathlib import Path
from typing import Literal, Protocol

from actors.engines.engine import Engine
from matpo.config import Engine as Settings
from matpo.config import Lora
from matpo.errors import UserError

KINDS: Mapping[Literal["embedded", "sglang"], tuple[str, str, str]] = {
    "embedded": ("actors.engines.embedded.players", "Players", "pip install 'matpo[torch]'"),
    "sglang": ("actors.engines.sglang.engine", "SglangEngine", "pip install matpo"),
}
"""Kind → module, class, and what installs its libraries."""


class _Openable(Protocol):
    def open(
        self, folder: Path, settings: Settings, *, lora: Lora | None, seed: int, log: Path | None
    ) -> AbstractAsyncContextManager[Engine]: ...


def open_engine(
    folder: Path, settings: Settings, *, lora: Lora | None = None, seed: int, log: Path | None = None
) -> AbstractAsyncContextManager[Engine]:
    """The engine of `settings.kind` on the model in `folder`; weights come with the first `load`.

    With `lora` they are the tensors of such an adapter (`matpo.adapters`). `log` receives what a server of the
    engine's own prints.

    Entering raises `UserError` for a model, a device or a server that cannot be used; so does this call when the
    engine's libraries are not installed.
    """
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    module, name, install = KINDS[settings.kind]
    try:
        engine: _Openable = vars(import_module(module))[name]
    except ModuleNotFoundError as error:
        raise UserError(
            f"actor.engine.kind {settings.kind!r} needs the package {error.name!r}; run {install}"
        ) from error
    return engine.open(folder, settings, lora=lora, seed=seed, log=log)
