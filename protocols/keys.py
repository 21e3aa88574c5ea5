"""CURVE keys as files: who the hub is, who an actor is, and which actors may come in. Secret files are 0600."""

from __future__ import annotations

import fcntl
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from pydantic import Field, ValidationError

from protocols.records import Record

HUB_FILE: Final = "hub.key"
ACTOR_FILE: Final = "actor.key"
ALLOWED_FILE: Final = "allowed_actors"
PUBLIC_KEY: Final = r"^[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}$"
"""Z85, as ZeroMQ writes keys."""


class BadKeys(ValueError):
    """A key file is missing, unreadable or open to others; the message says what to do."""


class KeyPair(Record):
    """A CURVE25519 pair in Z85 (40 characters each), the encoding of ZeroMQ's own tools."""

    public: str = Field(pattern=PUBLIC_KEY)
    secret: str = Field(pattern=PUBLIC_KEY, repr=False)


class _ActorFile(Record):
    pair: KeyPair
    hub: str = Field(pattern=PUBLIC_KEY)


@dataclass(frozen=True, slots=True)
class HubKeys:
    """What a hub, or a relay, needs to listen beyond its machine."""

    pair: KeyPair
    directory: Path = field(repr=False)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read `hub.key`. Raises `BadKeys`."""
        try:
            pair = KeyPair.model_validate_json(_read_secret(directory / HUB_FILE))
        except ValidationError as error:
            raise _broken(directory / HUB_FILE) from error
        allowed(directory)
        return cls(pair, directory)

    @classmethod
    def of_relay(cls, directory: Path) -> Self:
        """A relay listens with its own pair (`actor.key`) and its own list: it is not the hub. Raises `BadKeys`."""
        pair = ActorKeys.load(directory).pair
        if not allowed(directory):
            raise BadKeys(f"{directory / ALLOWED_FILE} lets nobody in; run `matpo keys allow {directory} KEY`")
        return cls(pair, directory)

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


def write_hub_keys(directory: Path, *, hub: KeyPair, actor: KeyPair) -> None:
    """Write `hub.key`, `actor.key` (to be copied to an actor's machine) and the list of allowed actors.

    Raises `BadKeys` where keys exist already: replacing them would lock every actor out.
    """
    _require_new(directory, HUB_FILE)
    write_actor_keys(directory, actor, hub=hub.public)
    _write_secret(directory / HUB_FILE, hub.model_dump_json())
    allow(directory, actor.public)


def write_actor_keys(directory: Path, pair: KeyPair, *, hub: str) -> None:
    """Write `actor.key` for the hub with this public key. Raises `BadKeys` where there is one already."""
    checked_public(hub)
    _require_new(directory, ACTOR_FILE)
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise BadKeys(f"folder {directory} cannot be made ({error.strerror}); give another") from error
    _write_secret(directory / ACTOR_FILE, _ActorFile(pair=pair, hub=hub).model_dump_json())


def checked_public(public: str) -> str:
    """The same text; raises `BadKeys` for what is no public key."""
    if not re.fullmatch(PUBLIC_KEY, public):
        raise BadKeys(f"{public!r} is not a public key (40 Z85 characters, as `matpo keys show` prints)")
    return public


def allow(directory: Path, public: str) -> None:
    """Let the actor with this public key in; a running hub notices at once. Raises `BadKeys` for a malformed key."""
    checked_public(public)
    with _reachable(directory / ALLOWED_FILE):
        if not directory.is_dir():
            raise BadKeys(f"folder {directory} does not exist; make keys with `matpo keys new {directory}`")
        with _alone(directory):
            known = allowed(directory)
            if public not in known:
                _write_secret(directory / ALLOWED_FILE, "".join(f"{key}\n" for key in [*known, public]))


def allowed(directory: Path) -> list[str]:
    """Public keys of those who may come in. Raises `BadKeys` where others could have written the list."""
    path = directory / ALLOWED_FILE
    with _reachable(path):
        if not path.exists():
            return []
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o022:
            raise BadKeys(f"key list {path} can be changed by others (mode {mode:04o}); run `chmod 600 {path}`")
        return path.read_text(encoding="ascii", errors="replace").split()


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """One at a time: of two that read the list at once, one would write over what the other added. The other holds it
    for as long as a small file takes to write."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _reachable(path: Path) -> Iterator[None]:
    """What the system does not let us do with a file is told as a key problem: keys are often somebody else's."""
    try:
        yield
    except OSError as error:
        raise BadKeys(
            f"key file {path} cannot be used ({error.strerror}); it must belong to the user who runs matpo"
        ) from error


def _require_new(directory: Path, name: str) -> None:
    with _reachable(directory / name):
        if (directory / name).exists():
            raise BadKeys(f"{directory / name} exists already; remove {directory} first or choose another directory")


def _read_secret(path: Path) -> bytes:
    with _reachable(path):
        if not path.is_file():
            raise BadKeys(f"key file {path} does not exist; make keys with `matpo keys new {path.parent}`")
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise BadKeys(f"key file {path} can be read by others (mode {mode:04o}); run `chmod 600 {path}`")
        return path.read_bytes()


def _write_secret(path: Path, text: str) -> None:
    with _reachable(path):
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text)
        draft.replace(path)


def _broken(path: Path) -> BadKeys:
    return BadKeys(f"key file {path} is damaged; make keys with `matpo keys new` in another directory")
