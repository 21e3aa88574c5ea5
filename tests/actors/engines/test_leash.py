"""A leashed server ends with whoever holds the leash, and leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

LEASH = [sys.executable, "-m", "actors.engines.sglang.leash", sys.executable, "-c"]
LIVES_ON = "import pathlib, tempfile, time; f = tempfile.mkstemp()[1]; print(f, flush=True); time.sleep(600)"
SHARES = """
import mmap, subprocess, sys, time
path = f"/dev/shm/sglang_loads_{sys.argv[1]}.shm"
hold = "import mmap, sys, time; f = open(sys.argv[1], 'w+b'); f.truncate(8); m = mmap.mmap(f.fileno(), 8); f.close()"
subprocess.Popen([sys.executable, "-c", hold + "; print(sys.argv[1], flush=True); time.sleep(600)", path])
time.sleep(600)
"""


def test_a_server_ends_when_its_leash_is_let_go_and_its_temporary_files_go_with_it() -> None:
    with subprocess.Popen([*LEASH, LIVES_ON], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as leash:
        assert leash.stdin is not None and leash.stdout is not None
        left = Path(leash.stdout.readline().strip())
        assert left.is_file()
        leash.stdin.close()
        assert leash.wait(timeout=30) == 128 + 9
    assert not left.parent.exists()


def test_a_killed_leash_takes_its_server_with_it_and_the_next_removes_its_temporary_files() -> None:
    with subprocess.Popen([*LEASH, LIVES_ON], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as leash:
        assert leash.stdout is not None
        left = Path(leash.stdout.readline().strip())
        (server,) = psutil.Process(leash.pid).children()
        leash.kill()
        assert psutil.wait_procs([server], timeout=30)[1] == []
    assert left.is_file()
    with subprocess.Popen([*LEASH, "pass"], stdin=subprocess.PIPE) as following:
        assert following.wait(timeout=30) == 0
    assert not left.parent.exists()


def test_the_leash_ends_with_its_server_and_the_same_status() -> None:
    with subprocess.Popen([*LEASH, "raise SystemExit(3)"], stdin=subprocess.PIPE) as leash:
        assert leash.wait(timeout=30) == 3


def test_the_shared_memory_of_a_server_goes_with_it_however_it_ends(tmp_path: Path) -> None:
    for signalled in (False, True):
        words = [*LEASH, SHARES, tmp_path.name]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as leash:
            assert leash.stdin is not None and leash.stdout is not None
            shared = Path(leash.stdout.readline().strip())
            assert shared.is_file()
            if signalled:
                (server,) = psutil.Process(leash.pid).children()
                server.kill()
            else:
                leash.stdin.close()
            assert leash.wait(timeout=30) == 128 + 9
        assert not shared.exists()
