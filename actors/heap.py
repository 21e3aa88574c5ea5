"""Keeps an actor's memory small while tensors of all sizes come and go for days: glibc would hold on to ever more."""

from __future__ import annotations

import ctypes
from typing import Final

import anyio
import anyio.to_thread

EVERY_S: Final = 60.0
_ARENA_MAX: Final = -8
"""`M_ARENA_MAX` of malloc.h."""


def share_one_heap() -> None:
    """Let threads that start from now on allocate from one heap. By itself glibc opens one for every thread that finds
    none unused, up to eight a core, and each keeps free memory of its own. With another C library nothing happens."""
    if hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_ARENA_MAX, 1)


def trim() -> None:
    """Give memory that is free between blocks in use back to the system."""
    if hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


async def keep_small() -> None:
    """Trim once a minute, for ever."""
    while True:
        await anyio.sleep(EVERY_S)
        await anyio.to_thread.run_sync(trim)
