"""Key files: private, complete, and never overwritten."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from matpo.cli.main import dispatch
from matpo.errors import UserError
from protocols import keys
from protocols.channel import new_actor_keys, new_keys
from protocols.keys import ActorKeys, BadKeys, HubKeys, allow, allowed
from protocols.sockets import new_pair


def test_new_keys_let_their_own_actor_in(tmp_path: Path) -> None:
    new_keys(tmp_path / "keys")
    hub, actor = HubKeys.load(tmp_path / "keys"), ActorKeys.load(tmp_path / "keys")
    assert actor.hub == hub.pair.public
    assert hub.allows(actor.pair.public)
    assert not hub.allows(hub.pair.public)


def test_every_key_file_is_for_its_owner_only(tmp_path: Path) -> None:
    new_keys(tmp_path / "keys")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "keys").iterdir()}
    assert modes == {"hub.key": 0o600, "actor.key": 0o600, "allowed_actors": 0o600}


def test_secrets_do_not_show_in_logs(tmp_path: Path) -> None:
    new_keys(tmp_path)
    hub = HubKeys.load(tmp_path)
    assert hub.pair.secret not in repr(hub)
    assert hub.pair.secret not in repr(hub.pair)


def test_keys_are_not_overwritten(tmp_path: Path) -> None:
    new_keys(tmp_path)
    before = (tmp_path / "hub.key").read_bytes()
    with pytest.raises(BadKeys, match="exists already"):
        new_keys(tmp_path)
    assert (tmp_path / "hub.key").read_bytes() == before


def test_allowing_twice_lists_a_key_once(tmp_path: Path) -> None:
    public = "a" * 40
    allow(tmp_path, public)
    allow(tmp_path, public)
    assert allowed(tmp_path) == [public]


def test_of_two_who_allow_a_key_at_once_neither_undoes_what_the_other_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = threading.Thread(target=allow, args=(tmp_path, "b" * 40))

    def read_while_another_allows(directory: Path) -> list[str]:
        monkeypatch.undo()
        known = allowed(directory)
        other.start()
        other.join(timeout=0.3)  # it would be done by then, if it did not wait for us
        return known

    monkeypatch.setattr(keys, "allowed", read_while_another_allows)
    allow(tmp_path, "a" * 40)
    other.join(timeout=30)
    assert allowed(tmp_path) == ["a" * 40, "b" * 40]


@contextmanager
def somebody_else() -> Iterator[None]:
    """Without the rights of root, if these tests have them."""
    mine = os.geteuid()
    if mine == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(mine)


@pytest.mark.parametrize("closed", ["folder", "files"])
def test_keys_that_belong_to_somebody_else_are_named_with_the_remedy(closed: str) -> None:
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "keys"
        new_keys(folder)
        Path(parent).chmod(0o755)
        for path in [folder] if closed == "folder" else [*folder.iterdir(), folder]:
            path.chmod(0o000 if closed == "folder" or path != folder else 0o555)
        tries: list[Callable[[], object]] = [
            lambda: HubKeys.load(folder),
            lambda: ActorKeys.load(folder),
            lambda: allow(folder, "a" * 40),
            lambda: new_actor_keys(folder / "new", hub="a" * 40),
        ]
        with somebody_else():
            for one in tries:
                with pytest.raises(BadKeys, match=r"cannot be (used|made) \(Permission denied\)"):
                    one()
            with pytest.raises(UserError, match=r"key file .* cannot be used"):
                dispatch(["keys", "show", str(folder)])
        folder.chmod(0o700)


@pytest.mark.parametrize("public", ["", "short", "ä" * 40, "a" * 39 + "\n"])
def test_what_is_no_public_key_is_not_allowed(tmp_path: Path, public: str) -> None:
    with pytest.raises(BadKeys, match="is not a public key"):
        allow(tmp_path, public)


def test_missing_keys_name_the_command_that_makes_them(tmp_path: Path) -> None:
    with pytest.raises(BadKeys, match=r"hub.key does not exist; make keys with `matpo keys new"):
        HubKeys.load(tmp_path)


def test_a_key_file_that_others_can_read_is_refused_with_the_remedy(tmp_path: Path) -> None:
    new_keys(tmp_path)
    (tmp_path / "actor.key").chmod(0o644)
    with pytest.raises(BadKeys, match=r"mode 0644\); run `chmod 600"):
        ActorKeys.load(tmp_path)


@pytest.mark.parametrize("load", [HubKeys.load, ActorKeys.load])
@pytest.mark.parametrize("content", ["", "{}", "junk", '{"public": "x", "secret": "y"}'])
def test_a_damaged_key_file_is_named(tmp_path: Path, load: Callable[[Path], object], content: str) -> None:
    new_keys(tmp_path)
    for name in ("hub.key", "actor.key"):
        (tmp_path / name).write_text(content)
    with pytest.raises(BadKeys, match="is damaged"):
        load(tmp_path)


def test_a_public_key_can_be_written_on_a_command_line() -> None:
    assert not [pair for pair in (new_pair() for _ in range(600)) if pair.public.startswith("-")]
