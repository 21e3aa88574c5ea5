"""The command line of `matpo`, as far as it hands on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

TOLD = "import os, sys, time\nprint(os.getpid(), sys.argv[1:], flush=True)\ntime.sleep(60)\n"
MATPO = """
import sys
from matpo.cli import main
main.PASSED_ON["eval"] = ["told"]
main.main()
"""


def test_a_command_that_is_a_program_of_its_own_is_the_process_that_was_started(tmp_path: Path) -> None:
    (tmp_path / "told.py").write_text(TOLD)
    path = os.pathsep.join((str(tmp_path), *sys.path))
    with subprocess.Popen(
        [sys.executable, "-c", MATPO, "eval", "a.toml", "run.seed=1"],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        told = process.stdout.readline()
        process.terminate()
        assert told == f"{process.pid} ['a.toml', 'run.seed=1']\n", "and no other is left when it is killed"
    assert process.returncode == -signal.SIGTERM
