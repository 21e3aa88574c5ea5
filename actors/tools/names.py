"""What the model calls a tool: `server__tool`, or the name its entry gives it; always reversible."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from matpo.config import ServerExtras
from matpo.errors import UserError

MAX_NAME_CHARACTERS = 64
"""What function-calling APIs accept."""
_NOT_ALLOWED = re.compile(r"[^A-Za-z0-9_-]")

Tool = tuple[str, str]
"""Server and tool, as MCP knows them."""


def model_names(tools: Sequence[Tool], extras: Mapping[str, ServerExtras]) -> dict[str, Tool]:
    """Model-facing name → (server, tool), in the order given; `extras` by server.

    Raises `UserError` for a name that two tools would share and for one that is too long.
    """
    named: dict[str, Tool] = {}
    for server, tool in tools:
        name = _name(server, tool, extras[server])
        if not 1 <= len(name) <= MAX_NAME_CHARACTERS:
            raise UserError(
                f"tool {tool!r} of server {server!r} would be called {name!r}, {len(name)} characters of at most"
                f" {MAX_NAME_CHARACTERS}; give it another name under `matpo.rename`"
            )
        if name in named:
            raise UserError(
                f"tools {named[name]} and {(server, tool)} would both be called {name!r};"
                " give one another name under `matpo.rename`, or deny it"
            )
        named[name] = (server, tool)
    return named


def matching(pattern: str, names: Mapping[str, Tool]) -> list[str]:
    """The names that a role's `tools` entry means.

    It may be a name, `server__tool` or a pattern such as `server__*`, or a tool's own name if only one server has it.
    Raises `UserError` when nothing matches, or a tool's own name is that of several servers.
    """
    if pattern in names:
        return [pattern]
    found = [name for name, (server, tool) in names.items() if fnmatchcase(f"{server}__{tool}", pattern)]
    if not found:
        found = [name for name, (_, tool) in names.items() if tool == pattern]
        if len(found) > 1:
            raise UserError(f"{pattern!r} may mean {' or '.join(sorted(found))}; write which")
    if not found:
        known = ", ".join(sorted(names)) or "none"
        raise UserError(f"no tool matches {pattern!r}; the configured servers have: {known}")
    return found


def _name(server: str, tool: str, extras: ServerExtras) -> str:
    if tool in extras.rename:
        return _NOT_ALLOWED.sub("_", extras.rename[tool])
    return _NOT_ALLOWED.sub("_", tool if extras.bare_names else f"{server}__{tool}")
