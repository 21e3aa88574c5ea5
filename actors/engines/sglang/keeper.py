"""Keeps one server up: starts it, watches it, restarts it with growing pauses, and says when it may be used."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Literal, Protocol

import anyio
import anyio.abc
import structlog

from actors.engines.sglang.client import ServerGone, ServerRefused, SglangClient

log: structlog.stdlib.BoundLogger = structlog.get_logger()

Launch = Callable[[int], AbstractAsyncContextManager[anyio.abc.Process]]


class Restore(Protocol):
    """Gives a server the newest weights, unless it has them; a `fresh` one was just started and has none of ours."""

    async def __call__(self, *, fresh: bool) -> None: ...


PULSE_S = 5.0
PULSE_DEADLINE_S = 30.0
"""The server itself gives its scheduler 20 s to answer a health request."""
MISSED_PULSES = 2
"""In a row: a crowded machine may miss one."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
STARTING_LOOK_S = 0.25


class ServerDied(Exception):
    """The server ended or fell silent; the message says how."""


class Keeper:
    """`run` in a task; everybody else waits for `wait_ready` and reports trouble with `suspect`."""

    def __init__(
        self,
        client: SglangClient,
        launch: Launch | None,
        *,
        restore: Restore,
        start_timeout_s: float,
    ) -> None:
        """`launch(attempt)` starts the server; None: it is somebody else's."""
        self.state: Literal["ready", "starting", "failed"] = "starting"
        self.detail = "starting"
        self.starts = 0
        self.busy = False
        """While weights are swapped the server may be silent."""
        self._client = client
        self._launch = launch
        self._restore = restore
        self._start_timeout_s = start_timeout_s
        self._changed = anyio.Event()
        self._suspected = anyio.Event()
        self._condemned: str | None = None

    async def wait_ready(self) -> None:
        """Return once requests may be sent."""
        while self.state != "ready":
            await self._changed.wait()

    async def wait_started(self) -> None:
        """Return once the first start has succeeded. Raises `ServerDied` when it failed."""
        while self.state == "starting":
            await self._changed.wait()
        if self.state == "failed":
            raise ServerDied(self.detail)

    def suspect(self, reason: str) -> None:
        """A request failed: hold the others back until the server has been looked at."""
        if self.state == "ready":
            self._become("starting", reason)
        self._suspected.set()

    def condemn(self, reason: str) -> None:
        """The server is not to be used as it is: start a new one, or give somebody else's its weights again."""
        self._condemned = reason
        self.suspect(reason)

    async def run(self) -> None:
        """Keep the server up until cancelled."""
        failures = 0
        while True:
            began = time.monotonic()
            try:
                async with self._server() as process:
                    await self._wait_healthy(process)
                    await self._restore(fresh=True)
                    self._become("ready", "ready")
                    await self._watch(process)
            except (ServerDied, ServerGone, ServerRefused) as error:
                self._become("failed", str(error))
            failures = 0 if time.monotonic() - began > 10 * LONGEST_PAUSE_S else failures + 1
            pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (failures - 1)) if failures else FIRST_PAUSE_S
            log.warning("server lost", url=self._client.url, reason=self.detail, again_in_s=pause_s)
            await anyio.sleep(pause_s)

    def _become(self, state: Literal["ready", "starting", "failed"], detail: str) -> None:
        self.state, self.detail = state, detail
        self._changed.set()
        self._changed = anyio.Event()

    @asynccontextmanager
    async def _server(self) -> AsyncIterator[anyio.abc.Process | None]:
        self.starts += 1
        if self._launch is None:
            yield None
            return
        async with self._launch(self.starts) as process:
            yield process

    async def _wait_healthy(self, process: anyio.abc.Process | None) -> None:
        with anyio.move_on_after(self._start_timeout_s):
            while not await self._client.healthy(deadline_s=PULSE_DEADLINE_S):
                if process is not None and process.returncode is not None:
                    raise ServerDied(f"server ended with status {process.returncode} before it was ready")
                await anyio.sleep(STARTING_LOOK_S)
            return
        raise ServerDied(f"server at {self._client.url} not healthy within {self._start_timeout_s:g} s")

    async def _watch(self, process: anyio.abc.Process | None) -> None:
        """Until the server is lost; raises `ServerDied`."""
        reason, self._condemned = "lost", None
        async with anyio.create_task_group() as tasks:

            async def exits(running: anyio.abc.Process) -> None:
                nonlocal reason
                reason = f"server ended with status {await running.wait()}"
                tasks.cancel_scope.cancel()

            async def falls_silent() -> None:
                nonlocal reason
                missed = 0
                while self._condemned is None and missed < MISSED_PULSES:
                    missed = 0 if self.busy or await self._pulse() else missed + 1
                    if not missed:
                        with anyio.move_on_after(PULSE_S):
                            await self._suspected.wait()
                reason = self._condemned or f"server at {self._client.url} is not healthy"
                tasks.cancel_scope.cancel()

            if process is not None:
                tasks.start_soon(exits, process, name="server process")
            tasks.start_soon(falls_silent, name="server health")
        raise ServerDied(reason)

    async def _pulse(self) -> bool:
        self._suspected = anyio.Event()
        alive = await self._client.healthy(deadline_s=PULSE_DEADLINE_S)
        if alive and self.state == "starting" and self._condemned is None:
            await self._restore(fresh=False)
            self._become("ready", "ready")
        return alive or self.busy
