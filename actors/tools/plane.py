"""Every tool of every configured MCP server behind one `call` that never raises for a bad tool or server."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Self

import anyio
import structlog
from jsonschema import Draft202012Validator, SchemaError
from jsonschema.exceptions import best_match
from pydantic import JsonValue
from referencing import Registry
from referencing.exceptions import Unresolvable

from actors.tools.expand import configured_servers
from actors.tools.names import matches, model_names
from actors.tools.results import cut, readable
from actors.tools.server import ToolFailed, ToolRefused, ToolServer
from matpo.config import Tools
from matpo.errors import UserError
from protocols.records import Outcome

_log = structlog.get_logger("tools")


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


@dataclass(slots=True)
class ToolCount:
    """What the calls of one tool came to so far."""

    calls: int = 0
    model_errors: int = 0
    infrastructure_errors: int = 0
    seconds: float = 0.0
    result_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Tool:
    spec: ToolSpec
    server: ToolServer
    validator: Draft202012Validator
    max_result_bytes: int
    count: ToolCount = field(default_factory=ToolCount)


class ToolPlane:
    """The tools of a run. Open it once per actor; every episode calls through it."""

    def __init__(self, tools: Sequence[_Tool]) -> None:
        self._tools = {tool.spec.name: tool for tool in tools}

    @classmethod
    @asynccontextmanager
    async def open(cls, tools: Tools, *, variables: Mapping[str, str]) -> AsyncIterator[Self]:
        """Start and connect to every configured server; `variables` are expanded beside (and before) the environment.

        Raises `UserError` for a server that does not start, an unset variable, or names that clash.
        """
        entries = configured_servers(tools, {**os.environ, **variables})
        servers = [ToolServer(name, entry) for name, entry in entries.items()]
        try:
            async with anyio.create_task_group() as owners:
                for server in servers:
                    owners.start_soon(server.run, name=f"tool server {server.name}")
                for server in servers:
                    await server.ready()
                yield cls(_collect(servers, {name: entry.matpo.max_result_bytes for name, entry in entries.items()}))
                owners.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            # Task groups wrap whatever the block raised; callers want to catch that itself.
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
                error = error.exceptions[0]
            raise error from None

    @property
    def counts(self) -> dict[tuple[str, str], ToolCount]:
        """Per (server, tool): calls, failures, seconds and bytes so far."""
        return {(tool.spec.server, tool.spec.tool): tool.count for tool in self._tools.values()}

    def specs(self, patterns: Sequence[str], *, hidden: frozenset[str] = frozenset()) -> tuple[ToolSpec, ...]:
        """The tools that match, sorted by name, without the arguments named in `hidden`.

        Raises `UserError` for a pattern that matches no tool.
        """
        chosen: dict[str, ToolSpec] = {}
        for pattern in patterns:
            found = [
                tool.spec
                for tool in self._tools.values()
                if matches(pattern, name=tool.spec.name, server=tool.spec.server, tool=tool.spec.tool)
            ]
            if not found:
                known = ", ".join(sorted(self._tools)) or "none"
                raise UserError(f"no tool matches {pattern!r}; the configured servers have: {known}")
            chosen.update({spec.name: spec for spec in found})
        return tuple(_without(chosen[name], hidden) for name in sorted(chosen))

    async def call(
        self, name: str, arguments: Mapping[str, JsonValue], *, fixed: Mapping[str, JsonValue] | None = None
    ) -> ToolResult:
        """Call a tool by its model-facing name; `fixed` arguments override the model's."""
        began = time.monotonic()
        tool = self._tools.get(name)
        if tool is None:
            text = f"Error: there is no tool {name!r}. Available: {', '.join(sorted(self._tools)) or 'none'}."
            return ToolResult(text, "model_error", "", name, 0.0, len(text.encode()))
        text, outcome = await self._answer(tool, {**arguments, **(fixed or {})})
        seconds = time.monotonic() - began
        size = len(text.encode())
        count = tool.count
        count.calls += 1
        count.model_errors += outcome == "model_error"
        count.infrastructure_errors += outcome == "infrastructure"
        count.seconds += seconds
        count.result_bytes += size
        return ToolResult(text, outcome, tool.spec.server, tool.spec.tool, seconds, size)

    async def _answer(self, tool: _Tool, arguments: Mapping[str, JsonValue]) -> tuple[str, Outcome]:
        if wrong := _wrong_arguments(tool, arguments):
            return f"Error: {wrong}", "model_error"
        try:
            result = await tool.server.call(tool.spec.tool, arguments)
        except ToolRefused as error:
            return f"Error: {cut(str(error), tool.max_result_bytes)}", "model_error"
        except ToolFailed as error:
            return f"Error: the tool failed, not your call: {cut(str(error), tool.max_result_bytes)}", "infrastructure"
        text = cut(readable(result), tool.max_result_bytes)
        return (f"Error: {text}", "model_error") if result.is_error else (text, "ok")


def _collect(servers: Sequence[ToolServer], caps: Mapping[str, int]) -> list[_Tool]:
    offered = []
    for server in servers:
        for tool in server.tools:
            try:
                Draft202012Validator.check_schema(tool.input_schema)
            except SchemaError as error:
                _log.warning("tool dropped: bad schema", server=server.name, tool=tool.name, reason=error.message)
                continue
            offered.append((server, tool))
    names = model_names([(server.name, tool.name) for server, tool in offered])
    return [
        _Tool(
            spec=ToolSpec(name, server.name, tool.name, tool.description or "", tool.input_schema),
            server=server,
            # An empty registry: a schema's remote references are never fetched.
            validator=Draft202012Validator(tool.input_schema, registry=Registry()),
            max_result_bytes=caps[server.name],
        )
        for name, (server, tool) in zip(names, offered, strict=True)
    ]


def _wrong_arguments(tool: _Tool, arguments: Mapping[str, JsonValue]) -> str | None:
    try:
        error = best_match(tool.validator.iter_errors(arguments))
    except Unresolvable:
        # The schema refers to something it does not contain; the server itself has to judge the arguments.
        return None
    if error is None:
        return None
    where = "".join(f"[{part!r}]" for part in error.absolute_path)
    return f"bad arguments for {tool.spec.name}{f' at {where}' if where else ''}: {error.message}"


def _without(spec: ToolSpec, hidden: frozenset[str]) -> ToolSpec:
    properties = spec.parameters.get("properties")
    if not hidden or not isinstance(properties, dict) or hidden.isdisjoint(properties):
        return spec
    shown = {**spec.parameters, "properties": {key: value for key, value in properties.items() if key not in hidden}}
    if isinstance(required := spec.parameters.get("required"), list):
        shown["required"] = [key for key in required if key not in hidden]
    return ToolSpec(spec.name, spec.server, spec.tool, spec.description, shown)
