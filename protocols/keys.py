"""CURVE keys as files: who the hub is, who an actor is, and which actors may come in. Secret files are 0600."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from pydantic import Field, ValidationError

from protocols.records import Record

HUB_FILE: Final = "hub.key"
ACTOR_FILE: Final = "actor.key"
ALLOWED_FILE: Final = "allowed_actors"
_Z85: Final = r"^[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}$"


class BadKeys(ValueError):
    """A key file is missing, unreadable or open to others; the message says what to do."""


class KeyPair(Record):
    """A CURVE25519 pair in Z85 (40 characters each), the encoding of ZeroMQ's own tools."""

    public: str = Field(pattern=_Z85)
    secret: str = Field(pattern=_Z85, repr=False)


class _ActorFile(Record):
    pair: KeyPair
    hub: str = Field(pattern=_Z85)


@dataclass(frozen=True, slots=True)
class HubKeys:
    """What a hub needs to listen beyond its machine."""

    pair: KeyPair
    directory: Path = field(repr=False)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read `hub.key`. Raises `BadKeys`."""
        try:
            return cls(KeyPair.model_validate_json(_read_secret(directory / HUB_FILE)), directory)
        except ValidationError as error:
            raise _broken(directory / HUB_FILE) from error

    def allows(self, public: str) -> bool:
        """Whether the actor with this public key may come in. Read anew every time: no restart after `allow`."""
        return public in allowed(self.directory)


@dataclass(frozen=True, slots=True)
class ActorKeys:
    """What an actor needs to reach a hub on another machine."""

    pair: KeyPair
    hub: str
    """The hub's public key: the actor talks to nobody else."""

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read `actor.key`. Raises `BadKeys`."""
        try:
            keys = _ActorFile.model_validate_json(_read_secret(directory / ACTOR_FILE))
        except ValidationError as error:
            raise _broken(directory / ACTOR_FILE) from error
        return cls(keys.pair, keys.hub)


def write_keys(directory: Path, *, hub: KeyPair, actor: KeyPair) -> None:
    """Write `hub.key`, `actor.key` (to be copied to the actors' machines) and the list of allowed actors.

    Raises `BadKeys` where a hub key exists already: replacing it would lock every actor out.
    """
    if (directory / HUB_FILE).exists():
        raise BadKeys(f"{directory / HUB_FILE} exists already; remove {directory} first or choose another directory")
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    _write_secret(directory / HUB_FILE, hub.model_dump_json())
    _write_secret(directory / ACTOR_FILE, _ActorFile(pair=actor, hub=hub.public).model_dump_json())
    allow(directory, actor.public)


def allow(directory: Path, public: str) -> None:
    """Let the actor with this public key in; a running hub notices at once. Raises `BadKeys` for a malformed key."""
    try:
        KeyPair(public=public, secret=public)
    except ValidationError as error:
        raise BadKeys(f"{public!r} is not a public key (40 Z85 characters, as `matpo keys show` prints)") from error
    known = allowed(directory)
    if public not in known:
        _write_secret(directory / ALLOWED_FILE, "".join(f"{key}\n" for key in [*known, public]))


def allowed(directory: Path) -> list[str]:
    """Public keys of the actors that may come in."""
    path = directory / ALLOWED_FILE
    return path.read_text(encoding="ascii", errors="replace").split() if path.exists() else []


def _read_secret(path: Path) -> bytes:
    if not path.is_file():
        raise BadKeys(f"key file {path} does not exist; make keys with `matpo keys new {path.parent}`")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise BadKeys(f"key file {path} can be read by others (mode {mode:04o}); run `chmod 600 {path}`")
    return path.read_bytes()


def _write_secret(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)
    draft.replace(path)


def _broken(path: Path) -> BadKeys:
    return BadKeys(f"key file {path} is damaged; make keys with `matpo keys new` in another directory")
