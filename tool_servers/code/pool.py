"""Workers started ahead of their programs, each used once; a bounded number at a time, and a bounded wait for one."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import anyio.abc

from tool_servers.code.sandbox import Sandbox, SandboxError
from tool_servers.code.worker import Finished, Worker


class Busy(Exception):
    """Every worker stayed occupied for as long as a call may wait."""


class Pool:
    """Runs programs in workers of one sandbox."""

    def __init__(self, sandbox: Sandbox, *, ahead: int, at_once: int, wait_s: float = 10.0) -> None:
        self._sandbox = sandbox
        self._ahead = ahead
        self._at_once = at_once
        self._wait_s = wait_s
        self._free = anyio.Semaphore(at_once)
        self._waiting: deque[Worker] = deque()
        self._taken = anyio.Event()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Keep workers ready for the length of the block; ends with none left."""
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._keep_ready)
                yield
                tasks.cancel_scope.cancel()
        finally:
            for worker in self._waiting:
                await worker.close()

    async def run(self, code: str, *, timeout_s: float) -> Finished:
        """Run a program in a fresh worker.

        Raises `Busy` when none comes free in time, `SandboxError` or `OSError` when none can be started.
        """
        with anyio.move_on_after(self._wait_s) as limit:
            await self._free.acquire()
        if limit.cancelled_caught:
            raise Busy(f"busy: {self._at_once} programs run and none ended within {self._wait_s:g} s; call again later")
        try:
            worker = await self._take() or await Worker.start(self._sandbox)
            return await worker.run(code, timeout_s=timeout_s)
        finally:
            self._free.release()

    async def _take(self) -> Worker | None:
        """A worker that is ready, if there is one; others are started in its place."""
        self._taken.set()
        while self._waiting:
            worker = self._waiting.popleft()
            if worker.alive:
                return worker
            await worker.close()
        return None

    async def _keep_ready(self) -> None:
        while True:
            self._taken = anyio.Event()
            while len(self._waiting) < self._ahead:
                # Out of processes or memory for now: the next call starts its own worker, and says so if it cannot.
                try:
                    self._waiting.append(await Worker.start(self._sandbox))
                except (SandboxError, OSError):
                    break
            await self._taken.wait()
