"""One trainer of a run at a time: the next one waits until the one before it has saved and is gone.

Who lost its owner and its hub takes its last step to the end and saves. A successor that had already gone back to an
older checkpoint would find that one later, ahead of the ledger, and no trainer could start any more.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import structlog

from matpo.owner import LEAVE_LIMIT_S

PATIENCE_S: Final = LEAVE_LIMIT_S + 10.0
"""Whoever lost its owner is gone by then."""
LOOK_S: Final = 0.2

log = structlog.get_logger()


@contextmanager
def only_trainer(lock: Path, stopping: threading.Event, *, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Hold the file `lock` as long as this process trains; the system lets go of it however the process ends.

    Raises `TimeoutError`, naming the process that holds it, after `patience_s` seconds or when told to stop meanwhile.
    """
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _wait(descriptor, lock, stopping, patience_s)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} on {os.uname().nodename}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _wait(descriptor: int, lock: Path, stopping: threading.Event, patience_s: float) -> None:
    deadline_s, told = time.monotonic() + patience_s, False
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "that just started"
        if stopping.is_set() or time.monotonic() >= deadline_s:
            raise TimeoutError(
                f"the run of {str(lock)!r} is trained by process {holder}; wait until it ends or stop it"
            )
        if not told:
            log.warning("waits for the trainer before it", process=holder, limit_s=patience_s)
        told = True
        stopping.wait(LOOK_S)
