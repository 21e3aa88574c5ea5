"""The sender of weights as a process, without a server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from actors.engines.sglang.engine import SglangEngine
from actors.engines.sglang.link import SENDER, Sender, SenderLost
from matpo.config import SglangEngine as Settings
from matpo.errors import UserError
from tests.actors.engines.models import make_model

START_S = 90.0


def test_a_sender_ends_with_its_actor_even_while_it_waits_for_a_server() -> None:
    command = [sys.executable, "-I", str(SENDER), "1", "group", "127.0.0.1", "gloo", "300"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    with process.stdout:
        assert b"port" in process.stdout.readline()  # from here on it waits for a server that never comes
        process.stdin.close()
        assert process.wait(timeout=START_S) == 0


async def test_a_sender_that_is_no_program_or_dies_at_once_is_lost(tmp_path: Path) -> None:
    async def start(python: str) -> None:
        await Sender.start(
            python, ranks=1, address="127.0.0.1", backend="gloo", deadline_s=START_S, log=tmp_path / "log"
        )

    with anyio.fail_after(START_S):
        with pytest.raises(SenderLost, match="does not start"):
            await start(str(tmp_path / "none"))
        with pytest.raises(SenderLost, match="has died"):
            await start("/bin/false")


async def test_broadcasts_without_an_interpreter_for_senders_are_refused_at_the_start(tmp_path: Path) -> None:
    make_model("qwen3", tmp_path)
    settings = Settings(urls=("http://127.0.0.1:9",), handover="collective", python="nowhere", max_context_tokens=32)
    with pytest.raises(UserError, match="'nowhere' is no program"):
        async with SglangEngine.open(tmp_path, settings, seed=0):
            pass
