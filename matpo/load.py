"""Read a config file and its overrides; say what is wrong in one line."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, JsonValue, ValidationError

from matpo.config import Config
from matpo.errors import UserError

Tree = dict[str, JsonValue]


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
    for override in overrides:
        _apply(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, Config)}") from error


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
            raise UserError(f"override {override!r}: {section!r} is a value, not a section")
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
        return f"unknown option {key} = {first['input']!r}; {hint}{more}"
    if first["type"] == "missing":
        return f"option {key} is missing; set it{more}"
    message = first["msg"].removeprefix("Value error, ")
    value = f" = {first['input']!r}" if key and not isinstance(first["input"], dict) else ""
    return f"{key}{value}: {message}{more}" if key else f"{message}{more}"


def _fields_at(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    """Names of the options a section has; for a union of sections, of all its members."""
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    nodes = [schema]
    for part in location:
        following = []
        for node in nodes:
            child = node.get("properties", {}).get(part) or node.get("additionalProperties")
            if isinstance(child, dict):
                following += _resolve(child, definitions)
        nodes = following or nodes
    return sorted({name for node in nodes for name in node.get("properties", {})})


def _resolve(node: dict[str, JsonValue], definitions: dict[str, dict[str, JsonValue]]) -> list[dict[str, JsonValue]]:
    options = node.get("anyOf") or node.get("oneOf") or node.get("allOf") or [node]
    found: list[dict[str, JsonValue]] = []
    for option in options if isinstance(options, list) else []:
        if isinstance(option, dict):
            reference = option.get("$ref")
            found.append(definitions[reference.rsplit("/", 1)[1]] if isinstance(reference, str) else option)
    return found
