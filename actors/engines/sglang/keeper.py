"""Keeps one server up: starts it, watches it, restarts it with growing pauses, and says when it may be used."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final, Literal, Protocol

import anyio
import anyio.abc
import structlog

from actors.engines.sglang.client import ServerGone, ServerRefused, SglangClient

log: structlog.stdlib.BoundLogger = structlog.get_logger()

Launch = Callable[[int], AbstractAsyncContextManager[anyio.abc.Process]]
State = Literal["starting", "ready", "suspected", "silent", "failed"]
"""`suspected`: a request broke, and the server is being asked how it is; `silent`: it does not answer."""

PULSE_S = 5.0
DOUBT_S = 10.0
"""Without an answer for so long a server is not used. (It answers when its scheduler's next result comes.)"""
LOST_S = 60.0
"""Without an answer for so long it is given up: killed and started again, if it is ours."""
LOOK_AGAIN_S = 0.25
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
STEADY_S: Final = 300.0
"""A server that lived so long starts its pauses afresh."""


class ServerDied(Exception):
    """The server ended or fell silent; the message says how."""

    def __init__(self, reason: str, *, server: str = "") -> None:
        super().__init__(reason)
        self.server = server


class BringUp(Protocol):
    """Gives a healthy server what it lacks before it is used; a `fresh` one may be another than before."""

    async def __call__(self, *, fresh: bool) -> None: ...


class Keeper:
    """`run` in a task. `state` says whether the server may be used; report trouble with `suspect` or `condemn`."""

    def __init__(
        self,
        client: SglangClient,
        launch: Launch | None,
        *,
        bring_up: BringUp,
        changed: Callable[[], None],
        start_timeout_s: float,
    ) -> None:
        """`launch(attempt)` starts the server; None: it is somebody else's. `changed` is called when `state` is new."""
        self.state: State = "starting"
        self.detail = "starting"
        self.starts = 0
        self.busy = False
        """While weights are swapped the scheduler says nothing; the process in front of it must answer still."""
        self._client = client
        self._launch = launch
        self._bring_up = bring_up
        self._changed = changed
        self._start_timeout_s = start_timeout_s
        self._suspected = anyio.Event()
        self._condemned: str | None = None
        self._up = False
        """Whether the running server was given what it lacked."""

    def suspect(self, reason: str) -> None:
        """A request failed: hold the others back until the server has been looked at."""
        if self.state == "ready":
            self._become("suspected", reason)
        self._suspected.set()

    def condemn(self, reason: str) -> None:
        """The server is not to be used as it is: start a new one, or bring up somebody else's anew."""
        self._condemned = reason
        self._become("failed", reason)
        self._suspected.set()

    async def run(self) -> None:
        """Keep the server up until cancelled."""
        failures = 0
        while True:
            began, self._condemned = time.monotonic(), None
            try:
                async with self._server() as process:
                    await self._wait_healthy(process)
                    await self._use(process)
            except ServerDied as error:
                self._become("failed", str(error))
            failures = 0 if time.monotonic() - began > STEADY_S else failures + 1
            pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** max(0, failures - 1))
            log.warning("server lost", url=self._client.url, reason=self.detail, again_in_s=pause_s)
            await anyio.sleep(pause_s)

    def _become(self, state: State, detail: str) -> None:
        self.state, self.detail = state, detail
        self._changed()

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
            while not await self._client.healthy(deadline_s=DOUBT_S):
                if process is not None and process.returncode is not None:
                    raise ServerDied(f"server ended with status {process.returncode} before it was ready")
                await anyio.sleep(LOOK_AGAIN_S)
            return
        raise ServerDied(f"server at {self._client.url} not healthy within {self._start_timeout_s:g} s")

    async def _use(self, process: anyio.abc.Process | None) -> None:
        """Bring the server up and watch it, from the first moment, until it is lost; raises `ServerDied`."""
        reason = ""
        self._up = False
        async with anyio.create_task_group() as tasks:

            def lose(why: str) -> None:
                nonlocal reason
                reason = reason or why  # what follows from the end is not its cause
                tasks.cancel_scope.cancel()

            async def exits(running: anyio.abc.Process) -> None:
                lose(f"server ended with status {await running.wait()}")

            async def fades() -> None:
                lose(await self._wait_lost())

            async def rises() -> None:
                try:
                    await self._bring_up(fresh=True)
                except (ServerGone, ServerRefused) as error:
                    lose(str(error))
                    return
                self._up = True
                self._become("ready", "ready")
                log.info("server ready", url=self._client.url, start=self.starts)

            if process is not None:
                tasks.start_soon(exits, process, name="server process")
            tasks.start_soon(fades, name="server health")
            tasks.start_soon(rises, name="server start")
        raise ServerDied(reason)

    async def _wait_lost(self) -> str:
        """Ask the server how it is, now and then, until it is lost; returns why."""
        answered_at = time.monotonic()
        while self._condemned is None:
            self._suspected = anyio.Event()
            if await self._answers():
                answered_at = time.monotonic()
                try:
                    await self._trust()
                except (ServerGone, ServerRefused) as error:
                    return str(error)
                with anyio.move_on_after(PULSE_S):
                    await self._suspected.wait()
                continue
            silent_s = time.monotonic() - answered_at
            if silent_s >= LOST_S:
                return f"server at {self._client.url} did not answer for {silent_s:.0f} s"
            self._become("silent", f"no answer for {silent_s:.0f} s")
            await anyio.sleep(LOOK_AGAIN_S)
        return self._condemned

    async def _answers(self) -> bool:
        if not self.busy and await self._client.healthy(deadline_s=DOUBT_S):
            return True
        return self.busy and await self._client.present(deadline_s=DOUBT_S)

    async def _trust(self) -> None:
        """Use a server again that answered; one that is being brought up yet is not used before that is done."""
        if self.state not in ("suspected", "silent"):
            return
        if not self._up:
            self._become("starting", "starting")
            return
        await self._bring_up(fresh=False)
        if self.state in ("suspected", "silent") and self._condemned is None:
            self._become("ready", "ready")
