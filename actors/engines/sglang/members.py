"""Who belongs to a fleet: servers we start, servers at given URLs, or the workers of a router as they come and go."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path

import anyio
import anyio.abc
import structlog
from anyio import TASK_STATUS_IGNORED
from anyio.abc import TaskStatus

from actors.engines.sglang.client import ServerGone, ServerRefused, SglangClient
from actors.engines.sglang.fleet import Fleet
from actors.engines.sglang.handover import Handover, Parcel
from actors.engines.sglang.keeper import ServerDied
from actors.engines.sglang.launch import free_port, gpu_groups, last_words, launched
from actors.engines.sglang.model import ModelFacts
from actors.engines.sglang.router import Router
from actors.engines.sglang.server import Server
from matpo.config import Lora
from matpo.config import SglangEngine as Settings
from matpo.errors import UserError

log: structlog.stdlib.BoundLogger = structlog.get_logger()

Start = Callable[[SglangClient, int], AbstractAsyncContextManager[anyio.abc.Process]]
"""(client to be pointed at the server, how many starts before) → the server's process."""


class Members:
    """Brings the servers of the settings into a fleet, all at the same time, and keeps them there."""

    def __init__(
        self,
        fleet: Fleet,
        facts: ModelFacts,
        settings: Settings,
        *,
        handover: Handover,
        lora: Lora | None,
        newest: Callable[[], Parcel | None],
        seed: int,
        log: Path,
    ) -> None:
        self._fleet = fleet
        self._facts = facts
        self._settings = settings
        self._handover = handover
        self._lora = lora
        self._newest = newest
        self._seed = seed
        self._log = log
        self._leave: dict[str, anyio.CancelScope] = {}

    @asynccontextmanager
    async def present(self) -> AsyncIterator[None]:
        """All have come up, and are kept up while the block lasts. Raises `UserError` when one cannot."""
        unusable: UserError | None = None
        async with anyio.create_task_group() as tasks:
            try:
                await self._enter(tasks)
                await self._fleet.wait_started(list(self._fleet.servers.values()))
            except UserError as error:
                unusable = error
            except ServerDied as error:
                unusable = self._unusable(error)
            else:
                yield
            tasks.cancel_scope.cancel()
        if unusable is not None:
            raise unusable

    async def _enter(self, tasks: anyio.abc.TaskGroup) -> None:
        settings = self._settings
        if settings.router is not None:
            await tasks.start(self._route, settings.router, name="sglang router")
            return
        for url in settings.urls:
            await tasks.start(self._keep, url, url, None, name=f"sglang server {url}")
        if not settings.urls:
            for index, gpus in enumerate(gpu_groups(settings, os.environ.get("CUDA_VISIBLE_DEVICES"))):
                start = self._starter(index, gpus)
                await tasks.start(self._keep, str(index), "", start, name=f"sglang server {index}")

    async def _keep(
        self, name: str, url: str, start: Start | None, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED
    ) -> None:
        """One server, as long as it belongs here."""
        async with SglangClient.open(url) as client, anyio.create_task_group() as errands:
            server = Server(
                name,
                client,
                facts=self._facts,
                settings=self._settings,
                handover=self._handover,
                counts=self._fleet.counts,
                launch=None if start is None else partial(start, client),
                newest=self._newest,
                changed=self._fleet.notice,
                errands=errands,
            )
            try:
                with self._fleet.joined(server):
                    task_status.started()
                    await server.keeper.run()
            finally:
                with anyio.CancelScope(shield=True):
                    await server.line.close()
                    await server.leave()

    async def _route(self, url: str, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        """A router and its workers, which come and go."""
        async with SglangClient.open(url) as client:
            router = Router(client, self._facts, self._settings, counts=self._fleet.counts, servers=self._fleet.servers)
            try:
                workers = await router.look()
            except (ServerGone, ServerRefused) as error:
                raise UserError(f"actor.engine.router {url!r}: {error}; start the router first") from error
            if not workers:
                raise UserError(f"actor.engine.router {url!r} has no workers; add one with POST {url}/workers")
            self._fleet.router = router
            try:
                async with anyio.create_task_group() as tasks:
                    for worker in workers:
                        await tasks.start(self._work, worker, name=f"sglang server {worker}")
                    task_status.started()
                    async for workers in router.watch():
                        for worker in workers - self._fleet.servers.keys():
                            log.info("worker joined", router=url, server=worker)
                            await tasks.start(self._work, worker, name=f"sglang server {worker}")
                        for worker in self._leave.keys() - workers:
                            log.info("worker left", router=url, server=worker)
                            self._leave.pop(worker).cancel()
            finally:
                with anyio.CancelScope(shield=True):
                    await router.line.close()

    async def _work(self, url: str, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        """A server as long as its router has it."""
        with anyio.CancelScope() as self._leave[url]:
            await self._keep(url, url, None, task_status=task_status)

    def _starter(self, index: int, gpus: str | None) -> Start:
        """Starts one server again and again, each time on a free port and sampling other random numbers."""

        def start(client: SglangClient, attempt: int) -> AbstractAsyncContextManager[anyio.abc.Process]:
            port, settings = free_port(), self._settings
            client.url = f"http://127.0.0.1:{port}"
            seed = self._seed + index + settings.servers * attempt
            folder, output = self._facts.folder, self._output(str(index))
            return launched(folder, settings, self._lora, port=port, seed=seed, gpus=gpus, log=output)

        return start

    def _output(self, name: str) -> Path:
        return self._log.with_stem(f"{self._log.stem}-{name}")

    def _unusable(self, error: ServerDied) -> UserError:
        settings = self._settings
        if settings.router is not None:
            return UserError(f"actor.engine.router, worker {error.server}: {error}; see that it runs")
        if settings.urls:
            return UserError(f"actor.engine.urls, {error.server}: {error}; start the server first")
        output = self._output(error.server)
        return UserError(
            f"sglang server {error.server} did not start: {error}: {last_words(output)} (its log is {output})"
        )
