"""What is left of the tool servers of an actor that was killed: nothing, whatever they do."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from actors.tools.heir import GRACE_S

ACTOR = """
import sys
import anyio
from actors.tools.stdio import Command, start_process
command = Command(argv=(sys.executable, "-S", "-c", sys.argv[1]), env={}, cwd=None, max_line_bytes=1000)
async def main():
    async with start_process(command, on_end=lambda: None):
        async with start_process(command, on_end=lambda: None) as (process, _):
            pass
        print("up", flush=True)
        await anyio.sleep(1 if sys.argv[2] == "ends" else 600)
anyio.run(main, backend_options={"use_uvloop": True})
"""
DEAF = "import time\nwhile True: time.sleep(1)"
READS = "import sys\nsys.stdin.read()"


def servers_of(actor: subprocess.Popen[str]) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """The servers that run, and the heir."""
    children = psutil.Process(actor.pid).children()
    heirs = [child for child in children if "heir.py" in " ".join(child.cmdline())]
    return [child for child in children if child not in heirs], heirs


@contextmanager
def begun(server: str, how: str) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-c", ACTOR, server, how]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as actor:
        try:
            assert actor.stdout is not None and actor.stdout.readline() == "up\n"
            yield actor
        finally:
            actor.kill()


@pytest.mark.parametrize("how", ["deaf", "frozen"])
def test_a_server_that_does_not_end_by_itself_goes_with_its_killed_actor(how: str) -> None:
    with begun(DEAF if how == "deaf" else READS, how) as actor:
        (server,), heirs = servers_of(actor)
        if how == "frozen":
            server.send_signal(signal.SIGSTOP)
        actor.kill()
        _, alive = psutil.wait_procs([server, *heirs], timeout=GRACE_S + 20)
        assert alive == []


def test_an_actor_that_leaves_in_order_leaves_no_heir_either() -> None:
    with begun(READS, "ends") as actor:
        _, heirs = servers_of(actor)
        assert actor.wait(timeout=30) == 0
        left_s = time.monotonic()
        _, alive = psutil.wait_procs(heirs, timeout=GRACE_S)
        assert alive == [] and time.monotonic() - left_s < GRACE_S, "it has nothing to wait for"
