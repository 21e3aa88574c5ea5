"""Read a config file and its overrides; say what is wrong in one line."""

from __future__ import annotations

import difflib
import json
import stat
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from pydantic import BaseModel, JsonValue, TypeAdapter, ValidationError

from matpo.config import Config
from matpo.errors import UserError
from matpo.redaction import HIDDEN

Tree = dict[str, JsonValue]

SECRETS_FILE: Final = "secrets.json"
"""Beside a run's config.json, where that shows `<hidden>`: server → setting → value."""
_SECRETS: Final = TypeAdapter(dict[str, Tree])
_NOT_SECRET: Final = frozenset({"matpo", "command", "type", "cwd", "disabled", "envFile"})
"""Settings of a tool server whose values errors may quote."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file (or a run's resolved JSON) and apply `section.key=value` overrides.

    Relative paths in the file are taken from the working directory. Raises `UserError` naming the key, the value and
    the remedy.
    """
    if not path.is_file():
        raise UserError(f"config file {str(path)!r} does not exist; the shipped ones are in configs/")
    text = path.read_text(encoding="utf-8")
    try:
        tree: Tree = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"config file {str(path)!r} cannot be parsed: {error}") from error
    if path.suffix == ".json":
        _fill_in(tree, path.with_name(SECRETS_FILE))
    for override in overrides:
        _apply(tree, override)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, Config)}") from error
    for entry in config.tools.mcpServers.values():
        entry.conceal()
    return config


def _fill_in(tree: Tree, secrets: Path) -> None:
    """Put back what a run's config.json does not show."""
    tools = tree.get("tools")
    servers = tools.get("mcpServers") if isinstance(tools, dict) else None
    if not secrets.is_file() or not isinstance(servers, dict):
        return
    mode = stat.S_IMODE(secrets.stat().st_mode)
    if mode & 0o077:
        raise UserError(f"{str(secrets)!r} can be read by others (mode {mode:04o}); run `chmod 600 {secrets}`")
    try:
        hidden = _SECRETS.validate_json(secrets.read_bytes())
    except ValidationError as error:
        raise UserError(f"{str(secrets)!r} is damaged; remove it and give the secrets as overrides") from error
    for name, values in hidden.items():
        entry = servers.get(name)
        if isinstance(entry, dict):
            entry.update(values)


def _apply(tree: Tree, override: str) -> None:
    key, equals, raw = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not of the form section.key=value (for example learner.lr=1e-4)")
    try:
        value: JsonValue = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    *sections, last = key.split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise UserError(f"override {key!r}: {section!r} is a value, not a section")
        node = child
    node[last] = value


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem of a validation error as `key = value: what is wrong; remedy`."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(sorted(known)) or 'none'}"
        if location[-2:-1] and not close and location[-2] in _kinds(_nodes_at(model, location[:-2])):
            hint += f'; to change the kind, replace the section: {".".join(location[:-2])}={{kind="…", …}}'
        return f"unknown option {key}{_quoted(location, first['input'])}; {hint}{more}"
    if first["type"] == "missing":
        return f"option {key} is missing; set it{more}"
    if first["type"] == "union_tag_not_found":
        tag = str(first.get("ctx", {}).get("discriminator", "")).strip("'")
        return f"option {key}.{tag} is missing; known here: {', '.join(_tags_at(model, location, tag))}{more}"
    message = first["msg"].removeprefix("Value error, ")
    value = "" if isinstance(first["input"], dict) else _quoted(location, first["input"])
    return f"{key}{value}: {message}{more}" if key else f"{message}{more}"


def _quoted(location: Sequence[str], value: object) -> str:
    """The value an error is about, unless it may be secret."""
    if not location:
        return ""
    inside = location[location.index("mcpServers") + 2 :] if "mcpServers" in location else location
    return f" = {value!r}" if inside is location or (inside and inside[0] in _NOT_SECRET) else f" = {HIDDEN}"


def _tags_at(model: type[BaseModel], location: Sequence[str], tag: str) -> list[str]:
    """The values that the discriminator `tag` of a union may have."""
    constants = (_properties(node).get(tag, {}).get("const") for node in _nodes_at(model, location))
    return sorted(str(constant) for constant in constants if constant is not None)


def _kinds(nodes: Iterable[Tree]) -> set[str]:
    """The fixed values among the fields: what tells the members of a union apart."""
    constants = (field.get("const") for node in nodes for field in _properties(node).values())
    return {str(constant) for constant in constants if constant is not None}


def _fields_at(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    """Names of the options a section has; for a union of sections, of all its members."""
    return sorted({name for node in _nodes_at(model, location) for name in _properties(node)})


def _nodes_at(model: type[BaseModel], location: Sequence[str]) -> list[Tree]:
    schema = model.model_json_schema()
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
