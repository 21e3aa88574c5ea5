"""Fill `${VAR}`, `${VAR:-default}` and `${env:VAR}` into an MCP server entry; an unset variable is a user's error."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from pydantic import ValidationError

from matpo.config import McpServer, Tools
from matpo.errors import UserError

_VARIABLE = re.compile(r"\$\{(?:env:)?([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


def expand(text: str, variables: Mapping[str, str], *, server: str) -> str:
    """`text` with its variables filled in. Raises `UserError` naming the server and the variable that is not set."""

    def value(match: re.Match[str]) -> str:
        name, default = match[1], match[2]
        if name in variables and (variables[name] or default is None):
            return variables[name]
        if default is None:
            raise UserError(
                f"tool server {server!r} uses ${{{name}}}, which is not set;"
                f" export {name} or write ${{{name}:-default}}"
            )
        return str(default)

    return _VARIABLE.sub(value, text)


def expand_server(name: str, entry: McpServer, variables: Mapping[str, str]) -> McpServer:
    """The entry with variables filled into command, args, env, cwd, url and headers. Raises `UserError`."""

    def fill(text: str | None) -> str | None:
        return None if text is None else expand(text, variables, server=name)

    return entry.model_copy(
        update={
            "command": fill(entry.command),
            "args": tuple(expand(argument, variables, server=name) for argument in entry.args),
            "env": {key: expand(value, variables, server=name) for key, value in entry.env.items()},
            "cwd": fill(entry.cwd),
            "url": fill(entry.url),
            "headers": {key: expand(value, variables, server=name) for key, value in entry.headers.items()},
        }
    )


def configured_servers(tools: Tools, variables: Mapping[str, str]) -> dict[str, McpServer]:
    """Every configured server by name, inline and from `tools.file`, expanded. Raises `UserError`."""
    entries = dict(tools.mcpServers)
    for name, entry in _from_file(tools).items():
        if name in entries:
            raise UserError(f"tool server {name!r} is configured both inline and in {str(tools.file)!r}; keep one")
        entries[name] = entry
    return {name: expand_server(name, entry, variables) for name, entry in entries.items()}


def _from_file(tools: Tools) -> dict[str, McpServer]:
    if tools.file is None:
        return {}
    where = f"tools.file {str(tools.file)!r}"
    try:
        content = json.loads(tools.file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{where} cannot be read ({error.strerror}); give the path of an mcpServers JSON file"
        ) from error
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    # VS Code spells the key `servers`; Claude Desktop, Claude Code and Cursor `mcpServers`.
    entries = content.get("mcpServers", content.get("servers")) if isinstance(content, dict) else None
    if not isinstance(entries, dict):
        raise UserError(f"{where} has no `mcpServers` object; see docs/tools.md for the form")
    servers = {}
    for name, entry in entries.items():
        try:
            servers[str(name)] = McpServer.model_validate(entry)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise UserError(f"{where}: server {name!r}: {key}: {first['msg']}") from error
    return servers
