"""`matpo tools check`: starts every configured server by itself and says what it offers, or what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import anyio
import mcp_types as types

from actors.tools.cache import CallCache
from actors.tools.catalog import schema_hash
from actors.tools.configured import ConfiguredServer
from actors.tools.expand import configured_entries, expand_server
from actors.tools.names import matching, model_names
from actors.tools.server import Facts, ToolServer
from matpo.config import McpServer, Role, ServerExtras, Tools
from matpo.errors import UserError
from matpo.redaction import hide


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of one server."""

    server: str
    transport: str
    extras: ServerExtras
    tools: Sequence[types.Tool] = ()
    facts: Facts | None = None
    problem: str = ""
    """Empty when all is well; else what is wrong and what to do."""

    @property
    def schema_hash(self) -> str:
        """What `matpo.pin` may be set to."""
        return schema_hash(self.tools)


async def check_servers(tools: Tools, variables: Mapping[str, str]) -> list[Finding]:
    """Start all servers side by side; one that fails does not hide the others. Raises `UserError` for a bad file."""
    entries = {name: entry for name, entry in configured_entries(tools).items() if not entry.disabled}
    findings: dict[str, Finding] = {}

    async def look(name: str, entry: McpServer) -> None:
        try:
            findings[name] = await _look(name, expand_server(name, entry, variables), tools)
        except UserError as error:
            findings[name] = Finding(name, entry.transport, entry.matpo, problem=hide(str(error)))

    async with anyio.create_task_group() as tasks:
        for name, entry in entries.items():
            tasks.start_soon(look, name, entry, name=f"check {name}")
    return [findings[name] for name in entries]


def check_roles(findings: Sequence[Finding], roles: Mapping[str, Role]) -> None:
    """Look up the tools of every role. Raises `UserError`."""
    extras = {finding.server: finding.extras for finding in findings}
    names = model_names([(finding.server, tool.name) for finding in findings for tool in finding.tools], extras)
    for role, settings in roles.items():
        for pattern in settings.tools:
            try:
                matching(pattern, names)
            except UserError as error:
                raise UserError(f"episode.roles.{role}.tools: {error}") from error


async def _look(name: str, entry: McpServer, tools: Tools) -> Finding:
    if entry.matpo.cache == "replay":
        with CallCache.open(tools.cache_file) as cache:
            recorded = ConfiguredServer(name, entry, cache).backend.tools
        return Finding(name, "replay", entry.matpo, recorded)
    server = ToolServer(name, entry, restarts=False)
    async with anyio.create_task_group() as owner:
        owner.start_soon(server.run, name=f"tool server {name}")
        try:
            await server.ready()
            problem = "" if server.tools else "it offers no tool that may be used; see matpo.allow and matpo.deny"
        except UserError as error:
            problem = hide(str(error))
        server.stop()
    return Finding(name, entry.transport, entry.matpo, server.tools, server.facts, problem)
