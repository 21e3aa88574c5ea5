"""Writes what the tools do into the run's metrics while an actor plays."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import anyio

from actors.tools.plane import ToolPlane
from matpo.metrics import MetricsFile


@asynccontextmanager
async def reported(plane: ToolPlane, metrics: Path, actor_id: str, *, every_s: float) -> AsyncIterator[None]:
    """For the length of the block, append a line of stage `actor` every so many seconds in which a call was made."""
    with closing(MetricsFile(metrics)) as file:
        written = plane.figures(actor_id)

        def write() -> None:
            nonlocal written
            if (now := plane.figures(actor_id)) != written:
                file.append("actor", now)
                written = now

        async def keep_writing() -> None:
            while True:
                await anyio.sleep(every_s)
                write()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(keep_writing, name="tool figures")
            try:
                yield
            finally:
                write()
                tasks.cancel_scope.cancel()
