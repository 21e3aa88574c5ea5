"""Whether a run goes on, as its folder tells: by its hub, which may have ended in any way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from learner.hub.__main__ import write_address
from matpo.errors import UserError
from matpo.folder import RunFolder


def test_the_process_that_was_given_the_number_of_an_ended_hub_is_not_taken_for_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_address(folder, "tcp://127.0.0.1:1", "ipc:///nowhere")  # of this process, which is alive
    address = folder.hub_address()
    assert address is not None and address.born
    with pytest.raises(UserError, match="already going on"):
        folder.require_free()
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as other:
        folder.hub.write_text(address.model_copy(update={"pid": other.pid}).model_dump_json())
        assert folder.hub_address() is None
        folder.require_free()


def test_a_hub_that_has_ended_is_gone_though_its_parent_has_not_looked(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_address(folder, "tcp://127.0.0.1:1", "ipc:///nowhere")
    address = folder.hub_address()
    assert address is not None
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    folder.hub.write_text(address.model_copy(update={"pid": ended.pid, "born": 0}).model_dump_json())
    assert folder.hub_address() is None
    ended.wait()
