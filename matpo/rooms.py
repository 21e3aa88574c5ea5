"""Folders outside the run's own: each is locked by the processes that use it, and goes with the last of them.

The system lets go of a lock when a process dies, however it dies; what killed ones left is removed by the next that
needs a folder of that kind. Names are `prefix-USER-…`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from matpo.errors import UserError

TRY_AGAIN_S: Final = 0.02
JOIN_LIMIT_S: Final = 5.0
"""Longest that removing a folder nobody uses may keep a process from making it anew."""


def room(parent: Path, prefix: str, name: str) -> Path:
    """The path of this user's folder."""
    return parent / f"{prefix}-{os.getuid()}-{name}"


@contextmanager
def held(folder: Path, *, setting: str) -> Iterator[Path]:
    """Use the folder, made if need be and removed with the last who uses it. What dead ones left beside it goes first.

    `folder` is of `room`. Raises `UserError`, which advises to change `setting`, where it cannot be used.
    """
    sweep(folder.parent, folder.name.rsplit("-", 2)[0])
    descriptor = _join(folder, setting)
    try:
        yield folder
    finally:
        os.close(descriptor)
        _remove_if_deserted(folder)


def sweep(parent: Path, prefix: str) -> None:
    """Remove this user's folders that no living process uses."""
    for folder in parent.glob(f"{prefix}-{os.getuid()}-*"):
        _remove_if_deserted(folder)


def lock(descriptor: int, kind: int) -> bool:
    """Lock without waiting; False when another process holds what excludes it."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        there = path.lstat()
    except FileNotFoundError:
        return False
    opened = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (opened.st_dev, opened.st_ino)


def _join(folder: Path, setting: str) -> int:
    """Make the folder if need be and hold a shared lock on it; returns the lock's descriptor."""
    give_up_s = time.monotonic() + JOIN_LIMIT_S
    while time.monotonic() < give_up_s:
        try:
            with suppress(FileExistsError):  # not exist_ok: it may be gone again when that is looked into
                folder.mkdir(mode=0o700)
            descriptor = _open(folder)
        except FileNotFoundError:  # its last user left between the two calls, or the parent does not exist
            if not folder.parent.is_dir():
                raise UserError(f"folder {str(folder.parent)!r} does not exist; correct {setting}") from None
            continue
        except OSError as error:  # no folder, or not ours
            raise UserError(f"{str(folder)!r} cannot be used ({error.strerror}); set {setting}") from error
        mode = os.fstat(descriptor)
        if mode.st_uid != os.getuid() or stat.S_IMODE(mode.st_mode) & 0o077:
            os.close(descriptor)
            raise UserError(f"folder {str(folder)!r} is not ours alone; remove it, or set {setting}")
        if lock(descriptor, fcntl.LOCK_SH) and is_at(descriptor, folder):
            return descriptor
        os.close(descriptor)
        time.sleep(TRY_AGAIN_S)  # whoever removes it is done at once
    raise UserError(f"folder {str(folder)!r} is being removed and stays; remove it, or set {setting}")


def _remove_if_deserted(folder: Path) -> None:
    try:
        descriptor = _open(folder)
    except OSError:  # gone already, or somebody else's
        return
    try:
        ours = os.fstat(descriptor).st_uid == os.getuid()
        if ours and lock(descriptor, fcntl.LOCK_EX) and is_at(descriptor, folder):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


def _open(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
