"""A pydantic error in one line for the user: the option, its value unless that may be secret, and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Final

from pydantic import BaseModel, JsonValue, ValidationError
from pydantic_core import ErrorDetails

from matpo.redaction import HIDDEN, shown_setting
from matpo.tools_config import McpServer

Tree = dict[str, JsonValue]

_NOT_SECRET: Final = frozenset({"matpo", "command", "type", "cwd", "disabled", "envFile"})
"""Settings of a tool server whose values errors may quote."""
_SECTION: Final = "must be a section of names and values"
_MESSAGES: Final = {
    "model_type": _SECTION,
    "model_attributes_type": _SECTION,
    "dict_type": _SECTION,
    "tuple_type": "must be a list",
    "int_type": "must be a whole number, such as 8",
    "float_type": "must be a number, such as 0.5",
}
"""By type of error, where pydantic speaks of what only programs know."""


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem of a validation error as `key = value: what is wrong; remedy`."""
    first = error.errors()[0]
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return _problem(first, [str(part) for part in first["loc"]], model) + more


def _problem(error: ErrorDetails, location: Sequence[str], model: type[BaseModel]) -> str:
    known = error["type"] != "extra_forbidden"
    key, value = ".".join(_shown(model, location)), _quoted(model, location, error["input"], known=known)
    tag = str(error.get("ctx", {}).get("discriminator", "")).strip("'")
    match error["type"]:
        case "extra_forbidden":
            return f"unknown option {key}{value}; {_known_there(model, location)}"
        case "missing":
            return f"option {key} is missing; set it"
        case "union_tag_not_found":
            return f"option {key}.{tag} is missing; known here: {', '.join(_tags_at(model, location, tag))}"
        case "union_tag_invalid":
            given = error.get("ctx", {}).get("tag")
            return f"{key}.{tag} = {given!r} is unknown; known here: {', '.join(_tags_at(model, location, tag))}"
        case kind:
            said = error["msg"].removeprefix("Value error, ")
            message = _MESSAGES.get(kind) or said.replace("Input should", "must").replace("String should", "must")
            if not key or message.startswith(f"{location[0]}."):
                return message
            told = isinstance(error["input"], dict) or message.startswith(repr(error["input"]))
            return f"{key}{'' if told else value}: {message}"


def _known_there(model: type[BaseModel], location: Sequence[str]) -> str:
    """What an unknown option may have been meant for."""
    *section, name = location
    nodes = _nodes_at(model, section)
    known = sorted({option for node in nodes for option in _properties(node)})
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    hint = f"known here: {', '.join(known) or 'none'}"
    if len(_shown(model, section)) < len(section):
        hint += f'; to change the kind, replace the section: {".".join(_shown(model, section))}={{kind="…", …}}'
    return hint


def _quoted(model: type[BaseModel], location: Sequence[str], value: object, *, known: bool) -> str:
    """The value an error is about, unless it may be secret."""
    if not location:
        return ""
    if model is not McpServer and "mcpServers" not in location:
        seen = shown_setting(None if known else location[-1], value)
        return f" = {HIDDEN}" if seen == HIDDEN else f" = {seen!r}"
    inside = location if model is McpServer else location[location.index("mcpServers") + 2 :]
    return f" = {value!r}" if inside and inside[0] in _NOT_SECRET else f" = {HIDDEN}"


def _shown(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    """The location as a user writes it: without what tells the members of a union apart, a kind or a type."""
    shown = []
    for at, part in enumerate(location):
        nodes = _nodes_at(model, location[:at])
        kind = part in _kinds(nodes) and not any(part in _properties(node) for node in nodes)
        if not kind and "[" not in part:
            shown.append(part)
    return shown


def _tags_at(model: type[BaseModel], location: Sequence[str], tag: str) -> list[str]:
    """The values that the discriminator `tag` of a union may have."""
    constants = (_properties(node).get(tag, {}).get("const") for node in _nodes_at(model, location))
    return sorted(str(constant) for constant in constants if constant is not None)


def _kinds(nodes: Iterable[Tree]) -> set[str]:
    """The fixed values among the fields: what tells the members of a union apart."""
    constants = (field.get("const") for node in nodes for field in _properties(node).values())
    return {str(constant) for constant in constants if constant is not None}


@lru_cache
def _schema(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema()


def _nodes_at(model: type[BaseModel], location: Sequence[str]) -> list[Tree]:
    """The schemas of what may stand there: one, or every member of a union."""
    schema = _schema(model)
    definitions = schema.get("$defs", {})
    nodes = [schema]
    for part in location:
        following = []
        for node in nodes:
            child = _properties(node).get(part) or node.get("additionalProperties")
            if isinstance(child, dict):
                following += _resolve(child, definitions)
        nodes = following or [node for node in nodes if part in _kinds([node])] or nodes
    return nodes


def _properties(node: Tree) -> dict[str, Tree]:
    found = node.get("properties")
    return {name: child for name, child in found.items() if isinstance(child, dict)} if isinstance(found, dict) else {}


def _resolve(node: Tree, definitions: dict[str, Tree]) -> list[Tree]:
    options = node.get("anyOf") or node.get("oneOf") or node.get("allOf") or [node]
    found: list[Tree] = []
    for option in options if isinstance(options, list) else []:
        if isinstance(option, dict):
            reference = option.get("$ref")
            found.append(definitions[reference.rsplit("/", 1)[1]] if isinstance(reference, str) else option)
    return found
