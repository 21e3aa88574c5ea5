"""Two hubs on one journal: the second is told which process is the first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from learner.hub.lock import only_writer
from matpo.errors import UserError

HOLDER = """
import sys
from pathlib import Path
from learner.hub.lock import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_journal_has_one_writer_until_that_is_killed(tmp_path: Path) -> None:
    journal = tmp_path / "journal.sqlite"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(journal)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        found = rf"journal '.*journal\.sqlite' is written by the hub with process {holder.pid} on .*; wait until it has"
        with pytest.raises(UserError, match=found), only_writer(journal):
            pass
        holder.kill()
        holder.wait(timeout=30)
    with only_writer(journal), pytest.raises(UserError), only_writer(journal):
        pass
    with only_writer(journal):
        pass
