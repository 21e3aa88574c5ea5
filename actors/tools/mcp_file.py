"""Reads the MCP configuration file of another app: Claude Desktop, Claude Code, Cursor, Gemini, Cline, VS Code."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import JsonValue, ValidationError

from matpo.config import McpServer
from matpo.errors import UserError
from matpo.explain import explain

_STRING_OR_COMMENT = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)
_STRING_OR_TRAILING_COMMA = re.compile(r'"(?:\\.|[^"\\])*"|,(?=\s*[}\]])')
_EDITOR_VARIABLE = re.compile(r"\$\{(input:[^}]*|workspaceFolder|userHome)\}")
_APP_FOLDERS = (".vscode", ".cursor", ".gemini")


def is_mcp_file(path: Path) -> bool:
    """Whether a JSON file is of this kind (and no resolved config of ours)."""
    if path.suffix != ".json" or not path.is_file():
        return False
    try:
        content = _parse(path.read_text(encoding="utf-8-sig"))
    except ValueError:
        return False
    return isinstance(content, dict) and not {"mcpServers", "servers"}.isdisjoint(content)


def read_mcp_file(path: Path) -> dict[str, McpServer]:
    """Every server of the file by name. Raises `UserError` naming the file, the server and the key.

    Comments and trailing commas are allowed, as VS Code writes them. Its `${input:some-key}` is filled from the
    environment variable SOME_KEY, or the input's default.
    """
    where = f"tools.file {str(path)!r}"
    try:
        content = _parse(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(
            f"{where} cannot be read ({error.strerror}); give the path of an mcpServers JSON file"
        ) from error
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    # VS Code spells the key `servers`; Claude Desktop, Claude Code and Cursor `mcpServers`.
    entries = content.get("mcpServers", content.get("servers")) if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(entries, dict):
        raise UserError(f"{where} has no `mcpServers` object; see docs/tools.md for the form")
    folder = path.resolve().parent
    folder = folder.parent if folder.name in _APP_FOLDERS else folder
    own = {"workspaceFolder": str(folder), "userHome": str(Path.home()), **_inputs(content.get("inputs"))}
    servers = {}
    for name, entry in entries.items():
        try:
            servers[name] = McpServer.model_validate(_translated(entry, own))
        except ValidationError as error:
            raise UserError(f"{where}: server {name!r}: {explain(error, McpServer)}") from error
    return servers


def _parse(text: str) -> JsonValue:
    """JSON with comments and trailing commas."""
    text = _STRING_OR_COMMENT.sub(lambda match: match[0] if match[0].startswith('"') else " ", text)
    text = _STRING_OR_TRAILING_COMMA.sub(lambda match: match[0] if match[0].startswith('"') else "", text)
    content: JsonValue = json.loads(text)
    return content


def _inputs(declared: JsonValue) -> dict[str, str]:
    """VS Code's inputs as environment variables: `input:some-key` → `${SOME_KEY:-its default}`."""
    inputs = {}
    for item in declared if isinstance(declared, list) else []:
        if isinstance(item, dict) and isinstance(name := item.get("id"), str):
            variable = re.sub(r"\W", "_", name).upper()
            default = item.get("default")
            inputs[f"input:{name}"] = f"${{{variable}:-{default}}}" if isinstance(default, str) else f"${{{variable}}}"
    return inputs


def _translated(value: JsonValue, own: Mapping[str, str]) -> JsonValue:
    """The same value with the variables that only an editor knows made ordinary ones."""
    if isinstance(value, str):
        return _EDITOR_VARIABLE.sub(lambda match: own.get(match[1], match[0]), value)
    if isinstance(value, list):
        return [_translated(item, own) for item in value]
    if isinstance(value, dict):
        return {key: _translated(item, own) for key, item in value.items()}
    return value
