"""Every tool of every configured MCP server behind one `call` that never raises for a bad tool or server."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, closing
from dataclasses import dataclass, field
from typing import Self

import anyio
from pydantic import JsonValue

from actors.tools.arguments import ArgumentCheck
from actors.tools.cache import Answer, CallCache, RecordedTool
from actors.tools.configured import ConfiguredServer
from actors.tools.expand import configured_servers
from actors.tools.failures import ToolFailed, ToolRefused
from actors.tools.figures import ToolCount
from actors.tools.names import matching, model_names
from actors.tools.pool import Backend
from actors.tools.results import cut, readable
from matpo.config import Tools
from matpo.errors import UserError
from matpo.redaction import hide_from_model
from matpo.tool_figures import ActorFigures, ServerFigures
from protocols.records import Outcome

Starts = Callable[[], Iterator[tuple[str, float]]]
"""Every server that has not started yet, and the seconds since its first start began."""


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool as prompts show it."""

    name: str
    """What the model calls it."""
    server: str
    tool: str
    description: str
    parameters: Mapping[str, JsonValue]
    """JSON schema of the arguments, without hidden ones."""


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a call came to. `text` is what the model reads, whatever happened."""

    text: str
    outcome: Outcome
    server: str
    tool: str
    seconds: float
    result_bytes: int


@dataclass(frozen=True, slots=True)
class _Tool:
    spec: ToolSpec
    backend: Backend
    check: ArgumentCheck
    max_result_bytes: int
    record: RecordedTool | None
    count: ToolCount = field(default_factory=ToolCount)


class EpisodeTools:
    """The tools as one episode uses them. Close it when the episode is over."""

    def __init__(self, tools: Mapping[str, _Tool], backends: Sequence[Backend], episode: int) -> None:
        self._tools = tools
        self._backends = backends
        self._episode = episode

    async def call(
        self, name: str, arguments: Mapping[str, JsonValue], *, fixed: Mapping[str, JsonValue] | None = None
    ) -> ToolResult:
        """Call a tool by its model-facing name; `fixed` arguments override the model's."""
        began = time.monotonic()
        tool = self._tools.get(name)
        if tool is None:
            text = f"Error: there is no tool {name!r}. Available: {', '.join(sorted(self._tools)) or 'none'}."
            return ToolResult(text, "model_error", "", name, 0.0, len(text.encode()))
        answer = await self._answer(tool, {**arguments, **(fixed or {})})
        seconds = time.monotonic() - began
        size = len(answer.text.encode())
        tool.count.add(answer.outcome, seconds=seconds, result_bytes=size, recorded=answer.recorded)
        return ToolResult(answer.text, answer.outcome, tool.spec.server, tool.spec.tool, seconds, size)

    def close(self) -> None:
        """The episode is over: servers of its own are stopped."""
        for backend in self._backends:
            backend.release(self._episode)

    async def _answer(self, tool: _Tool, arguments: Mapping[str, JsonValue]) -> Answer:
        if wrong := tool.check.wrong(tool.spec.name, arguments):
            return Answer(f"Error: {wrong}", "model_error")
        if tool.record is None:
            return await self._ask(tool, arguments)
        return await tool.record.answer(arguments, lambda: self._ask(tool, arguments))

    async def _ask(self, tool: _Tool, arguments: Mapping[str, JsonValue]) -> Answer:
        try:
            result = await tool.backend.call(tool.spec.tool, arguments, self._episode)
        except ToolRefused as error:
            return Answer(f"Error: {_told(str(error), tool)}", "model_error")
        except ToolFailed as error:
            return Answer(f"Error: the tool failed, not your call: {_told(str(error), tool)}", "infrastructure")
        text = _told(readable(result), tool)
        return Answer(f"Error: {text}", "model_error") if result.is_error else Answer(text, "ok")


class ToolPlane:
    """The tools of a run. Open it once per actor; every episode calls through its own `episode()`."""

    def __init__(self, servers: Mapping[str, ConfiguredServer]) -> None:
        self._servers = servers
        self._tools = {tool.spec.name: tool for tool in _collect(servers)}
        self._names = {tool.spec.name: (tool.spec.server, tool.spec.tool) for tool in self._tools.values()}
        self._episodes = itertools.count()

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        tools: Tools,
        *,
        variables: Mapping[str, str],
        episodes: int = 1,
        watch: Callable[[Starts], None] = lambda starts: None,
    ) -> AsyncIterator[Self]:
        """Start and connect to every configured server; `variables` are expanded beside (and before) the environment.

        `episodes`: the most at a time. `watch` is given a look at the starts before they begin. Raises `UserError` for
        a server that does not start or has no room for them, an unset variable, or names that clash.
        """
        entries = configured_servers(tools, {**os.environ, **variables})
        for name, entry in entries.items():
            if entry.matpo.scope == "episode" and entry.matpo.max_episodes < episodes:
                raise UserError(
                    f"tool server {name!r} has room for {entry.matpo.max_episodes} episodes and {episodes} are played"
                    f" at a time; set its matpo.max_episodes to {episodes}, or actor.concurrency lower"
                )
        try:
            with ExitStack() as stack:
                wanted = any(entry.matpo.cache != "off" for entry in entries.values())
                cache = stack.enter_context(CallCache.open(tools.cache_file)) if wanted else None
                async with anyio.create_task_group() as owners:
                    servers = {name: ConfiguredServer(name, entry, cache) for name, entry in entries.items()}
                    watch(lambda: _starts(servers))
                    for server in servers.values():
                        if server.live is not None:
                            server.live.start(owners)
                    for server in servers.values():
                        await server.ready()
                    yield cls(servers)
                    owners.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            # Task groups wrap whatever the block raised; callers want to catch that itself.
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
                error = error.exceptions[0]
            raise error from None

    def specs(self, patterns: Sequence[str], *, hidden: frozenset[str] = frozenset()) -> tuple[ToolSpec, ...]:
        """The tools that match, sorted by name, without the arguments named in `hidden`.

        Raises `UserError` for a pattern that matches no tool.
        """
        chosen = {name for pattern in patterns for name in matching(pattern, self._names)}
        return tuple(_without(self._tools[name].spec, hidden) for name in sorted(chosen))

    def name_of(self, server: str, tool: str) -> str:
        """What the model calls a tool. Raises `UserError`."""
        for name, known in self._names.items():
            if known == (server, tool):
                return name
        tools = ", ".join(sorted(other for home, other in self._names.values() if home == server)) or "none"
        raise UserError(f"server {server!r} has no tool {tool!r}; it offers: {tools}")

    def episode(self) -> EpisodeTools:
        """The tools for one more episode."""
        return EpisodeTools(self._tools, [server.backend for server in self._servers.values()], next(self._episodes))

    async def call(self, name: str, arguments: Mapping[str, JsonValue]) -> ToolResult:
        """One call that is an episode of its own."""
        with closing(self.episode()) as tools:
            return await tools.call(name, arguments)

    def silent(self) -> Iterator[tuple[str, float]]:
        """Every server, and the seconds for which calls to it have been without any answer."""
        for name, server in self._servers.items():
            if server.live is not None:
                yield name, server.live.silent_s

    def figures(self, actor_id: str) -> ActorFigures:
        """What all calls came to since the plane was opened."""
        tools = sorted(self._tools.values(), key=lambda tool: (tool.spec.server, tool.spec.tool))
        return ActorFigures(
            actor_id=actor_id,
            tools=tuple(tool.count.figures(f"{tool.spec.server}__{tool.spec.tool}") for tool in tools),
            servers=tuple(
                ServerFigures(server=name, up=live.up, copies=live.copies, losses=live.losses)
                for name, server in self._servers.items()
                if (live := server.live) is not None
            ),
        )


def _starts(servers: Mapping[str, ConfiguredServer]) -> Iterator[tuple[str, float]]:
    for name, server in servers.items():
        if server.live is not None and server.live.starting_s:
            yield name, server.live.starting_s


def _collect(servers: Mapping[str, ConfiguredServer]) -> list[_Tool]:
    found = [(server, tool) for server in servers.values() for tool in server.backend.tools]
    extras = {server.name: server.extras for server in servers.values()}
    names = model_names([(server.name, tool.name) for server, tool in found], extras)
    return [
        _Tool(
            spec=ToolSpec(name, server.name, tool.name, tool.description or "", tool.input_schema),
            backend=server.backend,
            check=ArgumentCheck(tool.input_schema),
            max_result_bytes=server.extras.max_result_bytes,
            record=server.record(tool),
        )
        for name, (server, tool) in zip(names, found, strict=True)
    ]


def _told(text: str, tool: _Tool) -> str:
    """What the model, and with it the journal, gets of a text."""
    return cut(hide_from_model(text), tool.max_result_bytes)


def _without(spec: ToolSpec, hidden: frozenset[str]) -> ToolSpec:
    properties = spec.parameters.get("properties")
    if not hidden or not isinstance(properties, dict) or hidden.isdisjoint(properties):
        return spec
    shown = {**spec.parameters, "properties": {key: value for key, value in properties.items() if key not in hidden}}
    if isinstance(required := spec.parameters.get("required"), list):
        shown["required"] = [key for key in required if key not in hidden]
    return ToolSpec(spec.name, spec.server, spec.tool, spec.description, shown)
