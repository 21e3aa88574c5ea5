"""Read a config file and its overrides; say what is wrong in one line."""

from __future__ import annotations

import json
import stat
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pydantic import JsonValue, TypeAdapter, ValidationError

from matpo.config import Config
from matpo.errors import UserError
from matpo.explain import Tree, explain

SECRETS_FILE: Final = "secrets.json"
"""Beside a run's config.json, where that shows `<hidden>`: server → setting → value."""
_SECRETS: Final = TypeAdapter(dict[str, Tree])


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file (or a run's resolved JSON) and apply `section.key=value` overrides.

    Relative paths in the file are taken from the working directory. Raises `UserError` naming the key, the value and
    the remedy.
    """
    tree = _read(path)
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


def _read(path: Path) -> Tree:
    """The settings as they are written."""
    name = f"config file {str(path)!r}"
    form = "JSON" if path.suffix == ".json" else "TOML"
    if not path.exists():
        raise UserError(f"{name} does not exist; the shipped ones are in configs/")
    try:
        text = path.read_text(encoding="utf-8-sig")
        tree: JsonValue = json.loads(text) if form == "JSON" else tomllib.loads(text)
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}); give a TOML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text (at byte {error.start}); save it as UTF-8") from error
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{name} is not {form}: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{name} holds a list or a value; give a TOML file, or the config.json of a run")
    return tree


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
