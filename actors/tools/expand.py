"""Fill `${VAR}`, `${VAR:-default}` and `${env:VAR}` into an MCP server entry; an unset variable is a user's error."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from actors.tools.mcp_file import read_mcp_file
from matpo.config import McpServer, Tools
from matpo.errors import UserError
from matpo.load import SECRETS_FILE
from matpo.redaction import HIDDEN, conceal

_PLACE = re.compile(r"\$\{([^}]*)\}")
_VARIABLE = re.compile(r"(?:env:)?([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)
_SETTING = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*)")


def expand(text: str, variables: Mapping[str, str], *, server: str) -> str:
    """`text` with its variables filled in. Raises `UserError` naming the server and the variable that is not set."""

    if HIDDEN in text:
        raise UserError(
            f"tool server {server!r} has a setting that a run's config.json does not show, and {SECRETS_FILE} is not"
            " beside it; give the original config, or the setting as an override"
        )

    def value(match: re.Match[str]) -> str:
        variable = _VARIABLE.fullmatch(match[1])
        if variable is None:
            raise UserError(
                f"tool server {server!r} uses {match[0]}, which nothing here can fill in;"
                " write ${VAR}, ${VAR:-default} or ${env:VAR}"
            )
        name, default = variable[1], variable[2]
        if name in variables and (variables[name] or default is None):
            conceal(name, variables[name])
            return variables[name]
        if default is None:
            raise UserError(
                f"tool server {server!r} uses ${{{name}}}, which is not set;"
                f" export {name} or write ${{{name}:-default}}"
            )
        return str(default)

    return _PLACE.sub(value, text)


def expand_server(name: str, entry: McpServer, variables: Mapping[str, str]) -> McpServer:
    """The entry with variables filled into command, args, env, envFile, cwd, url and headers. Raises `UserError`."""

    def fill(text: str | None) -> str | None:
        return None if text is None else expand(text, variables, server=name)

    env = {key: expand(value, variables, server=name) for key, value in entry.env.items()}
    if (file := fill(entry.envFile)) is not None:
        env = {**_read_env_file(Path(file), server=name), **env}
    filled = entry.model_copy(
        update={
            "command": fill(entry.command),
            "args": tuple(expand(argument, variables, server=name) for argument in entry.args),
            "env": env,
            "cwd": fill(entry.cwd),
            "url": fill(entry.url),
            "headers": {key: expand(value, variables, server=name) for key, value in entry.headers.items()},
        }
    )
    filled.conceal()
    return filled


def configured_servers(tools: Tools, variables: Mapping[str, str]) -> dict[str, McpServer]:
    """Every server that is not disabled by name, expanded. Raises `UserError`."""
    entries = configured_entries(tools)
    return {name: expand_server(name, entry, variables) for name, entry in entries.items() if not entry.disabled}


def configured_entries(tools: Tools) -> dict[str, McpServer]:
    """Every entry by name as it is written, inline and in `tools.file`. Raises `UserError`."""
    entries = dict(tools.mcpServers)
    for name, entry in (read_mcp_file(tools.file) if tools.file is not None else {}).items():
        if name in entries:
            raise UserError(f"tool server {name!r} is configured both inline and in {str(tools.file)!r}; keep one")
        entries[name] = entry
    return entries


def _read_env_file(path: Path, *, server: str) -> dict[str, str]:
    try:
        lines = list(enumerate(path.read_text(encoding="utf-8").splitlines(), start=1))
    except OSError as error:
        raise UserError(f"tool server {server!r}: envFile {str(path)!r} cannot be read ({error.strerror})") from error
    settings = {}
    for number, line in ((number, line.strip()) for number, line in lines):
        if not line or line.startswith("#"):
            continue
        setting = _SETTING.fullmatch(line)
        if setting is None:
            raise UserError(
                f"tool server {server!r}: envFile {str(path)!r}: line {number} is not of the form KEY=VALUE"
            )
        value = setting[2]
        quoted = len(value) >= 2 and value[0] == value[-1] and value[0] in "'\""
        settings[setting[1]] = value[1:-1] if quoted else value
    return settings
