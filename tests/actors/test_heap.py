"""What was freed between blocks in use does not stay with the process."""

from __future__ import annotations

import numpy as np
import psutil

from actors.heap import trimmer

BLOCK_BYTES, BLOCKS = 60_000, 1_500
"""Small enough to come from the heap; 90 MB."""


def test_memory_that_is_free_goes_back_to_the_system() -> None:
    trim, process = trimmer(), psutil.Process()
    assert trim is not None
    kept = [np.ones(BLOCK_BYTES, dtype=np.uint8) for _ in range(BLOCKS)][::100]  # a few stay, all over the heap
    before = process.memory_info().rss
    trim(0)
    assert len(kept) == BLOCKS // 100
    assert process.memory_info().rss < before - BLOCK_BYTES * BLOCKS // 2
