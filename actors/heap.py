"""Gives memory that is free back to the system: glibc keeps what lies between blocks in use, more every hour."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Final

import anyio
import anyio.to_thread

EVERY_S: Final = 60.0


def trimmer() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`; None with another C library."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
    return trim


async def keep_small() -> None:
    """Once a minute, for ever: tensors of all sizes come and go as long as the actor plays."""
    trim = trimmer()
    while trim is not None:
        await anyio.sleep(EVERY_S)
        await anyio.to_thread.run_sync(trim, 0)
