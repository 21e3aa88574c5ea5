"""The one copy of a run's weights on a machine: a file in shared memory that all actors of the run map.

Whoever has the turn brings the next version; the others wait and map it. All is owned through file locks, which the
system lets go of when a process dies: a lock on the folder says "I am here", one on a version's file "I use it", one on
`turn` "I bring the next". Files are named by version and digest, and are never changed once they have that name.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import anyio

from matpo.errors import UserError
from matpo.rooms import held, is_at, lock, room

SHARED_MEMORY: Final = Path("/dev/shm")
PREFIX: Final = "matpo-shadow"
SUFFIX: Final = ".safetensors"
POLL_S: Final = 0.02
"""How often a lock is tried: nothing tells one process that another let go of one."""
STALL_S: Final = 60.0
"""An actor that has the turn and shows no progress for so long (it was stopped, or its line is cut) loses it."""


class TurnLost(Exception):
    """Another actor took over; what this one was bringing is gone."""


@dataclass(frozen=True, slots=True)
class Copy:
    """A version's file."""

    version: int
    digest: str
    path: Path


class Shadow:
    """This actor's place in the shared folder of its run."""

    def __init__(self, folder: Path, *, stall_s: float = STALL_S) -> None:
        self.folder = folder
        self._stall_s = stall_s
        self._used: int | None = None
        """Descriptor of the copy this actor uses; the lock on it says so."""

    @classmethod
    @contextmanager
    def open(cls, run: str, *, memory: Path | None = None, stall_s: float = STALL_S) -> Iterator[Self]:
        """Join the actors of `run` on this machine. What dead ones left anywhere in `memory` is removed, and the folder
        when the last actor leaves. Raises `UserError` when the place cannot be used.
        """
        folder = room(memory or default_memory(), PREFIX, hashlib.sha256(run.encode()).hexdigest()[:16])
        with held(folder, setting="actor.weights.memory"):
            shadow = cls(folder, stall_s=stall_s)
            try:
                yield shadow
            finally:
                shadow._let_go()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[Turn]:
        """Be the one who may bring a version. Waits for whoever has the turn as long as that one makes progress."""
        path = self.folder / "turn"
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                turn = Turn(self, descriptor, path)
                if await self._wait_for(descriptor, path) and turn.is_ours():
                    turn.remove_drafts()
                    try:
                        yield turn
                    finally:
                        if turn.is_ours():
                            turn.remove_drafts()
                    return
            finally:
                os.close(descriptor)

    async def _wait_for(self, descriptor: int, path: Path) -> bool:
        """Until the lock is ours. False when it was taken from somebody who stalled: now there is another to take."""
        while not lock(descriptor, fcntl.LOCK_EX):
            if time.time() - os.fstat(descriptor).st_mtime > self._stall_s:
                _unlink_if_at(descriptor, path)
                return False
            await anyio.sleep(POLL_S)
        os.utime(descriptor)
        return True

    def require(self) -> None:
        """Raise `UserError` if somebody removed the folder."""
        if not self.folder.is_dir():
            raise UserError(f"folder {str(self.folder)!r} was removed under its actors; start this one again")

    def copies(self) -> list[Copy]:
        """All finished copies, oldest version first."""
        found = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            version, _, digest = path.name.removesuffix(SUFFIX).partition("-")
            if version.isdigit():
                found.append(Copy(int(version), digest, path))
        return sorted(found, key=lambda copy: copy.version)

    def discard(self, copy: Copy) -> None:
        """It turned out to be damaged: nobody shall map it any more."""
        copy.path.unlink(missing_ok=True)

    def use(self, used: Copy) -> None:
        """This actor uses the copy from now on, and no longer the one before; what nobody uses is removed.

        Call during a turn. Raises `TurnLost` when somebody removed the copy.
        """
        try:
            descriptor = os.open(used.path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise TurnLost(f"the copy of version {used.version} was removed before it was used") from error
        lock(descriptor, fcntl.LOCK_SH)
        self._let_go()
        self._used = descriptor
        for copy in self.copies():
            if copy != used:
                _unlink_if_unused(copy.path)

    def _let_go(self) -> None:
        if self._used is not None:
            os.close(self._used)
            self._used = None


class Turn:
    """The right to change the folder. It ends when another actor thinks this one has stalled."""

    def __init__(self, shadow: Shadow, descriptor: int, path: Path) -> None:
        self._shadow = shadow
        self._descriptor = descriptor
        self._lock = path

    def is_ours(self) -> bool:
        """Whether nobody took over."""
        return is_at(self._descriptor, self._lock)

    def progress(self) -> None:
        """Show those who wait that something happens. Raises `TurnLost`."""
        if not self.is_ours():
            raise TurnLost("another actor took over")
        os.utime(self._descriptor)

    def draft(self) -> Path:
        """A new name for a file that is being written. No two turns ever share one."""
        return self._shadow.folder / f"draft-{uuid.uuid4().hex}"

    def find(self, version: int, digest: str) -> Copy | None:
        """The finished copy of these weights."""
        copy = self._copy(version, digest)
        return copy if copy.path.is_file() else None

    def is_behind(self, version: int) -> bool:
        """Whether there is a copy of a later version."""
        return any(copy.version > version for copy in self._shadow.copies())

    def base_of(self, version: int) -> Copy | None:
        """The newest copy that is older than a version: what a delta may be applied to."""
        older = [copy for copy in self._shadow.copies() if copy.version < version]
        return older[-1] if older else None

    def make_room(self, keep: Copy | None) -> None:
        """Before another copy is made, remove all but the one it is made from: there are never more than two.

        An actor that still uses a removed copy keeps it mapped; it is more than a version behind. Raises `TurnLost`.
        """
        self.progress()
        for copy in self._shadow.copies():
            if copy != keep:
                copy.path.unlink(missing_ok=True)

    def finish(self, draft: Path, version: int, digest: str) -> Copy:
        """Give a complete draft its name. Raises `TurnLost` when it was taken away."""
        copy = self._copy(version, digest)
        try:
            draft.replace(copy.path)
        except FileNotFoundError as error:
            raise TurnLost(f"another actor took over before version {version} was complete") from error
        return copy

    def drop(self, draft: Path) -> None:
        """It has served."""
        draft.unlink(missing_ok=True)

    def remove_drafts(self) -> None:
        """What was not finished, now or by whoever had the turn before."""
        for path in self._shadow.folder.glob("draft-*"):
            path.unlink(missing_ok=True)

    def _copy(self, version: int, digest: str) -> Copy:
        return Copy(version, digest, self._shadow.folder / f"{version:010d}-{digest}{SUFFIX}")


def default_memory() -> Path:
    """Shared memory, or the temporary folder where the system has none."""
    usable = SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK)
    return SHARED_MEMORY if usable else Path(tempfile.gettempdir())


def _unlink_if_unused(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        if lock(descriptor, fcntl.LOCK_EX):
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _unlink_if_at(descriptor: int, path: Path) -> None:
    if is_at(descriptor, path):
        path.unlink(missing_ok=True)
