"""A leashed server ends with whoever holds the leash, and leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LEASH = [sys.executable, "-m", "actors.engines.sglang.leash", sys.executable, "-c"]
LIVES_ON = "import pathlib, tempfile, time; f = tempfile.mkstemp()[1]; print(f, flush=True); time.sleep(600)"


def test_a_server_ends_when_its_leash_is_let_go_and_its_temporary_files_go_with_it() -> None:
    with subprocess.Popen([*LEASH, LIVES_ON], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as leash:
        assert leash.stdin is not None and leash.stdout is not None
        left = Path(leash.stdout.readline().strip())
        assert left.is_file()
        leash.stdin.close()
        assert leash.wait(timeout=30) == 128 + 9
    assert not left.parent.exists()


def test_the_leash_ends_with_its_server_and_the_same_status() -> None:
    with subprocess.Popen([*LEASH, "raise SystemExit(3)"], stdin=subprocess.PIPE) as leash:
        assert leash.wait(timeout=30) == 3
