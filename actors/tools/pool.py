"""The copies of a configured server: some that all episodes share, or one for each episode; and when to call again."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Protocol

import anyio
import anyio.abc
import mcp_types as types
from pydantic import JsonValue

from actors.tools.catalog import is_idempotent
from actors.tools.failures import ToolFailed
from actors.tools.server import ToolServer
from matpo.config import McpServer, ServerExtras
from matpo.errors import UserError

FIRST_RETRY_S = 0.2
RETRY_GROWTH = 3.0


class Backend(Protocol):
    """Whatever answers the calls of one configured server."""

    @property
    def tools(self) -> Sequence[types.Tool]: ...

    async def call(self, tool: str, arguments: Mapping[str, JsonValue], episode: int) -> types.CallToolResult:
        """Call a tool for an episode. Raises `ToolFailed` or `ToolRefused`."""
        ...

    def release(self, episode: int) -> None:
        """The episode is over."""
        ...


class Shared:
    """One or more copies for all episodes. A call goes to the copy that is up and has the fewest under way."""

    def __init__(self, name: str, entry: McpServer) -> None:
        self.servers = [ToolServer(name, entry) for _ in range(entry.matpo.replicas)]
        self._extras = entry.matpo
        self._turn = 0

    def start(self, tasks: anyio.abc.TaskGroup) -> None:
        """Start all copies."""
        for number, server in enumerate(self.servers):
            tasks.start_soon(server.run, name=f"tool server {server.name} {number}")

    async def ready(self) -> None:
        """Wait for all copies. Raises `UserError` when one does not start."""
        for server in self.servers:
            await server.ready()

    @property
    def tools(self) -> Sequence[types.Tool]:
        return self.servers[0].tools

    @property
    def up(self) -> int:
        """Copies that can be called now."""
        return sum(server.up for server in self.servers)

    @property
    def copies(self) -> int:
        return len(self.servers)

    @property
    def silent_s(self) -> float:
        """Seconds for which the calls of some copy have been without any answer."""
        return max(server.silent_s for server in self.servers)

    @property
    def starting_s(self) -> float:
        """Seconds for which the longest first start of a copy has lasted."""
        return max(server.starting_s for server in self.servers)

    @property
    def losses(self) -> int:
        """Connections lost so far."""
        return sum(server.losses for server in self.servers)

    async def call(self, tool: str, arguments: Mapping[str, JsonValue], episode: int) -> types.CallToolResult:
        """Call a copy, and perhaps another one after a failure."""
        failed: ToolServer | None = None
        for pause_s in _pauses(tool, self._extras):
            server = self._choose(failed)
            try:
                return await server.call(tool, arguments)
            except ToolFailed:
                if pause_s is None:
                    raise
                failed = server
                await anyio.sleep(pause_s)
        raise AssertionError("the last attempt returns or raises")

    def release(self, episode: int) -> None:
        """Nothing here belongs to an episode."""

    def _choose(self, failed: ToolServer | None) -> ToolServer:
        self._turn += 1
        turn, count = self._turn, len(self.servers)

        def rank(number: int) -> tuple[bool, bool, int, int]:
            server = self.servers[number]
            # Copies that are as good take turns, so that one that hangs does not get every call.
            return not server.up, server is failed, server.inflight, (number + turn) % count

        return self.servers[min(range(count), key=rank)]


class PerEpisode:
    """A server for each episode, started by its first call. One that is lost is not replaced: its state is gone."""

    def __init__(self, name: str, entry: McpServer) -> None:
        self.name = name
        self._ended_losses = 0
        self._entry = entry
        self._probe = ToolServer(name, entry, restarts=False)
        self._places = anyio.Semaphore(entry.matpo.max_episodes)
        self._servers: dict[int, ToolServer] = {}
        self._tasks: anyio.abc.TaskGroup | None = None

    def start(self, tasks: anyio.abc.TaskGroup) -> None:
        """Start one server to learn its tools."""
        self._tasks = tasks
        tasks.start_soon(self._probe.run, name=f"tool server {self.name}, first look")

    async def ready(self) -> None:
        """Wait for its tools. Raises `UserError` when it does not start."""
        await self._probe.ready()
        self._probe.stop()

    @property
    def tools(self) -> Sequence[types.Tool]:
        return self._probe.tools

    @property
    def up(self) -> int:
        """Episodes whose server can be called now."""
        return sum(server.up for server in self._servers.values())

    @property
    def copies(self) -> int:
        """Episodes that have a server, or wait for one."""
        return len(self._servers)

    @property
    def silent_s(self) -> float:
        """Seconds for which the calls of some episode have been without any answer."""
        return max((server.silent_s for server in self._servers.values()), default=0.0)

    @property
    def starting_s(self) -> float:
        """Seconds for which the first look at its tools has lasted."""
        return self._probe.starting_s

    @property
    def losses(self) -> int:
        """Servers that ended before their episode."""
        return self._ended_losses + sum(server.losses for server in self._servers.values())

    async def call(self, tool: str, arguments: Mapping[str, JsonValue], episode: int) -> types.CallToolResult:
        """Call the episode's own server."""
        extras = self._entry.matpo
        server = self._own(episode)
        try:
            with anyio.fail_after(extras.start_timeout_s):
                await server.ready()
        except UserError as error:
            raise ToolFailed(str(error)) from error
        except TimeoutError:
            raise ToolFailed(
                f"server {self.name!r} did not start for this episode within {extras.start_timeout_s:g} s: at most"
                f" {extras.max_episodes} episodes have one at a time (matpo.max_episodes)"
            ) from None
        for pause_s in _pauses(tool, extras):
            try:
                return await server.call(tool, arguments)
            except ToolFailed:
                if pause_s is None:
                    raise
                await anyio.sleep(pause_s)
        raise AssertionError("the last attempt returns or raises")

    def release(self, episode: int) -> None:
        """Stop the episode's server, if it has one."""
        if (server := self._servers.pop(episode, None)) is not None:
            self._ended_losses += server.losses
            server.stop()

    def _own(self, episode: int) -> ToolServer:
        server = self._servers.get(episode)
        if server is None:
            assert self._tasks is not None, "started"
            server = ToolServer(self.name, self._entry, restarts=False, handshake=self._probe.handshake)
            self._servers[episode] = server
            self._tasks.start_soon(self._run, server, name=f"tool server {self.name} of episode {episode}")
        return server

    async def _run(self, server: ToolServer) -> None:
        async with self._places:
            await server.run()


class Nobody:
    """In place of a server whose recorded calls are replayed: every call that comes here was not recorded."""

    def __init__(self, name: str, tools: Sequence[types.Tool]) -> None:
        self._name = name
        self.tools = tools

    async def call(self, tool: str, arguments: Mapping[str, JsonValue], episode: int) -> types.CallToolResult:
        """Refuse."""
        raise ToolFailed(f"this call of {tool!r} was not recorded, and server {self._name!r} is only replayed")

    def release(self, episode: int) -> None:
        """Nothing here belongs to an episode."""


def _pauses(tool: str, extras: ServerExtras) -> list[float | None]:
    """What follows each attempt at a call that fails: a pause in seconds, or None for giving up."""
    retries = extras.retries if is_idempotent(tool, extras) else 0
    pauses = [FIRST_RETRY_S * RETRY_GROWTH**number * random.uniform(0.7, 1.0) for number in range(retries)]
    return [*pauses, None]
