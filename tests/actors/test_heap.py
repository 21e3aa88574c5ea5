"""What was freed does not stay with the process, and its threads share one heap."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from actors.heap import trim

BLOCK_BYTES, BLOCKS = 60_000, 1_500
"""Small enough to come from the heap; 90 MB."""
HEAPS = """
import ctypes, sys, threading
from actors.heap import share_one_heap
if sys.argv[1] == "shared":
    share_one_heap()
gate = threading.Barrier(9)
def hold():
    block = bytearray(5000)
    gate.wait(20)
    gate.wait(20)
threads = [threading.Thread(target=hold) for _ in range(8)]
for thread in threads:
    thread.start()
gate.wait(20)
library = ctypes.CDLL(None)
library.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(library.fopen(sys.argv[2].encode(), b"w"))
library.malloc_info(0, file)
library.fclose(file)
gate.wait(20)
"""


def test_memory_that_is_free_goes_back_to_the_system() -> None:
    process = psutil.Process()
    kept = [np.ones(BLOCK_BYTES, dtype=np.uint8) for _ in range(BLOCKS)][::100]  # a few stay, all over the heap
    before = process.memory_info().rss
    trim()
    assert len(kept) == BLOCKS // 100
    assert process.memory_info().rss < before - BLOCK_BYTES * BLOCKS // 2


@pytest.mark.parametrize("heap", ["shared", "own"])
def test_eight_threads_that_allocate_share_one_heap(heap: str, tmp_path: Path) -> None:
    report = tmp_path / "malloc.xml"
    subprocess.run([sys.executable, "-c", HEAPS, heap, str(report)], check=True, timeout=60)
    heaps = report.read_text(encoding="utf-8").count("<heap nr=")
    assert heaps == 1 if heap == "shared" else heaps > 1
