"""Which of a server's tools exist for the model, and the hash that tells whether they are still the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import mcp_types as types
import orjson
import structlog
from jsonschema import Draft202012Validator, SchemaError

from matpo.config import ServerExtras
from matpo.errors import UserError

MAX_SCHEMA_BYTES = 65_536
"""A tool whose schema and description are larger would fill every prompt: it is dropped."""
_log = structlog.get_logger("tools")


def offered(server: str, listing: Sequence[types.Tool], extras: ServerExtras) -> tuple[types.Tool, ...]:
    """The tools of a listing that are allowed and usable, sorted by name; the others are named in a warning."""
    tools = {tool.name: tool for tool in listing if _allowed(tool.name, extras)}
    kept = []
    for name in sorted(tools):
        if (reason := _unusable(tools[name])) is not None:
            _log.warning("tool dropped", server=server, tool=name, reason=reason)
        else:
            kept.append(tools[name])
    return tuple(kept)


def check_names(server: str, listing: Sequence[types.Tool], extras: ServerExtras) -> None:
    """Refuse extras about tools that the server does not have. Raises `UserError`."""
    names = sorted(tool.name for tool in listing)
    for key, given in (
        ("allow", extras.allow),
        ("deny", extras.deny),
        ("idempotent", extras.idempotent),
        ("rename", tuple(extras.rename)),
    ):
        for pattern in given:
            # A pattern may be there for tools that come later.
            if "*" not in pattern and pattern not in names:
                known = ", ".join(names) or "none"
                raise UserError(f"tool server {server!r} has no tool {pattern!r} (matpo.{key}); it has: {known}")


def is_idempotent(tool: str, extras: ServerExtras) -> bool:
    """Whether a tool may be called again after a failure that was not the model's."""
    return any(fnmatchcase(tool, pattern) for pattern in extras.idempotent)


def schema_hash(tools: Iterable[types.Tool]) -> str:
    """Sixteen hex digits of what a model sees of these tools: names, descriptions, argument schemas."""
    seen = sorted((tool.name, tool.description or "", _canonical(tool.input_schema)) for tool in tools)
    return hashlib.sha256(orjson.dumps(seen)).hexdigest()[:16]


def differences(before: Sequence[types.Tool], after: Sequence[types.Tool]) -> dict[str, list[str]]:
    """Names of the tools that were added, removed or changed; empty when nothing was."""
    old, new = ({tool.name: schema_hash([tool]) for tool in tools} for tools in (before, after))
    found = {
        "added": sorted(set(new) - set(old)),
        "removed": sorted(set(old) - set(new)),
        "changed": sorted(name for name in set(old) & set(new) if old[name] != new[name]),
    }
    return {kind: names for kind, names in found.items() if names}


def _allowed(tool: str, extras: ServerExtras) -> bool:
    if any(fnmatchcase(tool, pattern) for pattern in extras.deny):
        return False
    return not extras.allow or any(fnmatchcase(tool, pattern) for pattern in extras.allow)


def _unusable(tool: types.Tool) -> str | None:
    try:
        size = len(_canonical(tool.input_schema)) + len((tool.description or "").encode())
        if size > MAX_SCHEMA_BYTES:
            return f"its schema and description are {size:,} bytes, of at most {MAX_SCHEMA_BYTES:,}"
        Draft202012Validator.check_schema(tool.input_schema)
    except SchemaError as error:
        return f"bad schema: {error.message[:200]}"
    except (orjson.JSONEncodeError, RecursionError):
        return "its schema is nested too deeply"
    return None


def _canonical(schema: dict[str, object]) -> str:
    return orjson.dumps(schema, option=orjson.OPT_SORT_KEYS).decode()
