"""Ctrl-C saves and says how to go on; going on finishes the run with an exact ledger."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

import pytest

from tests.end_to_end.processes import QUICKSTART, matpo, only_run, short_run, started, summary
from tests.end_to_end.test_kill import reached, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_a_run_that_was_stopped_goes_on_to_its_end(tmp_path: Path) -> None:
    with started(*short_run(tmp_path, "run.steps=8")) as command:
        wait_until(lambda: any(tmp_path.iterdir()), command, limit_s=60, what="run folder")
        run = only_run(tmp_path)
        wait_until(partial(reached, run, 2), command, limit_s=240, what="step 2")
        command.process.send_signal(signal.SIGINT)
        output, _ = command.process.communicate(timeout=120)
        assert command.process.returncode == 130, output
        assert "Traceback" not in output
        assert "--resume" in output
    resumed = matpo("run", str(QUICKSTART), "--resume", str(run))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert summary(run)["steps"] == 8
    for check in ("doctor", "replay"):
        done = matpo(check, str(run))
        assert done.returncode == 0, done.stdout + done.stderr
