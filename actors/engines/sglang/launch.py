"""The command that starts a SGLang server, and the process it becomes."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import anyio
import anyio.abc
import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from actors.engines.sglang.adapters import served
from matpo.config import Lora
from matpo.config import SglangEngine as Settings
from matpo.errors import UserError

VERSIONS_AT_ONCE: Final = 4
"""Of several adapters, in one batch of a server."""

MARGIN_TOKENS = 2
"""The server ends an answer this short of its own limit; ours is exact."""


class _Positions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    max_position_embeddings: int | None = None


def check_context(folder: Path, settings: Settings) -> None:
    """Refuse a context the model has no positions for."""
    file = folder / "config.json"
    try:
        known = _Positions.model_validate(orjson.loads(file.read_bytes())).max_position_embeddings
    except (orjson.JSONDecodeError, ValidationError) as error:
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
    if known is not None and settings.max_context_tokens > known:
        raise UserError(
            f"actor.engine.max_context_tokens = {settings.max_context_tokens}, but {str(folder)!r} has only {known}"
            " positions; lower it"
        )


def free_port() -> int:
    """A port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def command(folder: Path, settings: Settings, lora: Lora | None = None, *, port: int, seed: int) -> list[str]:
    """Arguments of `sglang.launch_server` for this model, bound to this machine only: the server has no passwords."""
    context = settings.max_context_tokens + MARGIN_TOKENS
    options: list[str | int | float | Path] = [
        *("--model-path", folder.resolve(), "--skip-tokenizer-init", "--dtype", settings.dtype),
        *("--host", "127.0.0.1", "--port", port, "--random-seed", seed, "--tp-size", settings.tensor_parallel),
        *("--context-length", context, "--max-running-requests", settings.max_batch),
        *("--incremental-streaming-output", "--log-level", "warning"),
    ]
    if settings.memory_fraction is not None:
        options += ["--mem-fraction-static", settings.memory_fraction]
    if settings.device == "cpu":
        slots = settings.max_batch * context
        options += ["--device", "cpu", "--attention-backend", "torch_native", "--disable-overlap-schedule"]
        options += ["--max-total-tokens", slots]
    if lora is not None:
        options += ["--enable-lora", "--max-lora-rank", lora.rank]
        options += ["--lora-target-modules", *served(lora).target_modules]
        options += ["--lora-backend", "torch_native"] if settings.device == "cpu" else []
        if lora.own:  # requests of some versions at once, each with its adapters, and some with none
            options += ["--max-loras-per-batch", VERSIONS_AT_ONCE * len(lora.adapters) + 1]
    return [settings.python, "-m", "sglang.launch_server", *(str(option) for option in options), *settings.arguments]


def gpu_groups(settings: Settings, visible: str | None) -> Sequence[str | None]:
    """For each server we start, the GPUs it may use; None: whatever there is.

    `visible`: CUDA_VISIBLE_DEVICES of this process; `actor.engine.gpus` counts what is listed there. Raises
    `UserError` where that is too little.
    """
    if settings.device == "cpu":
        return [None] * settings.servers
    ranks = settings.tensor_parallel
    groups = settings.gpus or tuple(tuple(range(i * ranks, (i + 1) * ranks)) for i in range(settings.servers))
    if visible is None:
        return [",".join(map(str, group)) for group in groups]
    names = [name for name in visible.split(",") if name]
    most = max(max(group) for group in groups)
    if most >= len(names):
        raise UserError(
            f"actor.engine needs GPU {most} for {settings.servers} servers of {ranks} ranks, but CUDA_VISIBLE_DEVICES ="
            f" {visible!r} lists {len(names)}; lower actor.engine.servers or change actor.engine.gpus"
        )
    return [",".join(names[gpu] for gpu in group) for group in groups]


def environment(settings: Settings, *, gpus: str | None = None) -> dict[str, str]:
    """What the server sees of ours, and what it needs besides."""
    extra = {
        "OMP_NUM_THREADS": str(settings.threads),
        "HF_HUB_OFFLINE": "1",
        # Our margin may reach beyond the model's positions; no token is ever placed there.
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
    }
    if settings.device == "cpu":
        extra["SGLANG_USE_CPU_ENGINE"] = "1"
        if settings.tensor_parallel > 1:
            # Every rank must be told its cores; without this the server wants a NUMA node for each.
            cores = sorted(os.sched_getaffinity(0))
            bound = (str(cores[rank % len(cores)]) for rank in range(settings.tensor_parallel))
            extra["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(bound)
    if gpus is not None:
        extra["CUDA_VISIBLE_DEVICES"] = gpus
    return {**os.environ, **extra}


@asynccontextmanager
async def launched(
    folder: Path, settings: Settings, lora: Lora | None, *, port: int, seed: int, gpus: str | None, log: Path
) -> AsyncIterator[anyio.abc.Process]:
    """A server process, ended with all its children when the block ends or this process dies."""
    leash = [sys.executable, "-m", "actors.engines.sglang.leash"]
    with log.open("ab") as output:
        process = await anyio.open_process(
            [*leash, *command(folder, settings, lora, port=port, seed=seed)],
            stdout=output,
            stderr=output,
            env=environment(settings, gpus=gpus),
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with anyio.CancelScope(shield=True):
            if process.stdin is not None:
                await process.stdin.aclose()
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)  # a leash that was frozen with its server cannot let go of it
            await process.wait()
            await process.aclose()


def last_words(log: Path) -> str:
    """The line of a server's log that most likely says why it ended."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-200:] if log.is_file() else []
    telling = [line for line in lines if "Error" in line or "error:" in line]
    return (telling or lines or ["it printed nothing"])[-1].strip()
