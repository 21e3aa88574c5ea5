"""One writer per journal: a second hub, wherever it runs, is told which process is the first."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matpo.errors import UserError


@contextmanager
def only_writer(journal: Path) -> Iterator[None]:
    """Hold the lock beside a journal; the system lets go of it when this process ends, however it ends.

    Raises `UserError` while another process holds it.
    """
    descriptor = os.open(journal.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "that just started"
            raise UserError(
                f"journal {str(journal)!r} is written by the hub with process {holder};"
                " wait until it has ended, or stop it"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} on {os.uname().nodename}".encode(), 0)
        yield
    finally:
        os.close(descriptor)
