"""What the model calls a tool: its bare name when no other server has it, else `server__tool`; always reversible."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase

from matpo.errors import UserError

MAX_NAME_CHARACTERS = 64
"""What function-calling APIs accept."""
_NOT_ALLOWED = re.compile(r"[^A-Za-z0-9_-]")


def model_names(tools: Sequence[tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Model-facing name → (server, tool), in the order given. Raises `UserError` when two tools would share a name."""
    bare = Counter(_clean(tool) for _, tool in tools)
    named: dict[str, tuple[str, str]] = {}
    for server, tool in tools:
        name = _clean(tool) if bare[_clean(tool)] == 1 else f"{_clean(server)}__{_clean(tool)}"
        if len(name) > MAX_NAME_CHARACTERS:
            raise UserError(
                f"tool {tool!r} of server {server!r} would be called {name!r}, {len(name)} characters of at most"
                f" {MAX_NAME_CHARACTERS}; give the server a shorter name or deny the tool"
            )
        if name in named:
            raise UserError(
                f"tools {named[name]} and {(server, tool)} would both be called {name!r}; rename a server or deny one"
            )
        named[name] = (server, tool)
    return named


def matches(pattern: str, *, name: str, server: str, tool: str) -> bool:
    """Whether a role's `tools` entry means this tool: its name, `server__tool`, or a pattern such as `server__*`."""
    return pattern == name or fnmatchcase(f"{server}__{tool}", pattern)


def _clean(name: str) -> str:
    return _NOT_ALLOWED.sub("_", name)
