"""The processes of a run as `matpo run` keeps them, with small scripts in their place."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio

from matpo.cli.children import Children
from matpo.folder import HubAddress, RunFolder
from matpo.keeper import always
from tests.learner.hub.bench import make_config

SENT_HOME = """
import sys
from pathlib import Path
with Path(sys.argv[1]).open("a") as file:
    file.write("x")
"""
UNTIL = """
import sys, time
from pathlib import Path
while not Path(sys.argv[1]).exists():
    time.sleep(0.02)
"""


def children(folder: Path) -> Children:
    """A learner that ends once there is a file `done`, and an actor that is sent home as soon as it comes."""
    made = Children(make_config(actor={"count": 1}), RunFolder(folder))
    made.learner.command = always(sys.executable, "-S", "-c", UNTIL, str(folder / "done"))
    made.actors[0].command = always(sys.executable, "-S", "-c", SENT_HOME, str(folder / "starts"))
    return made


@contextmanager
def hub_runs(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in the hub's place."""
    with subprocess.Popen([sys.executable, "-S", "-c", UNTIL, str(folder / "done")]) as process:
        address = HubAddress(endpoint="tcp://127.0.0.1:1", trainer_endpoint="ipc://x", pid=process.pid, run="r")
        (folder / "hub.json").write_text(address.model_dump_json())
        try:
            yield process
        finally:
            process.kill()


async def holds(condition: Callable[[], bool]) -> None:
    """Look again and again: what other processes do can only be looked at."""
    while True:
        if condition():
            return
        await anyio.sleep(0.02)


async def test_an_actor_that_was_sent_home_comes_again_with_the_next_hub_of_the_same_learner(tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    with hub_runs(tmp_path) as first, anyio.fail_after(60), children(tmp_path) as made:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(made.keep)
            await holds(lambda: starts.is_file() and starts.read_text() == "x")
            await anyio.sleep(0.5)
            assert starts.read_text() == "x", "the hub that sent it home has no work for it"
            first.terminate()
            first.wait()
            with hub_runs(tmp_path):
                await holds(lambda: starts.read_text() == "xx")
            (tmp_path / "done").touch()


async def test_a_learner_that_waits_for_the_hub_of_the_one_before_it_waits_no_more_once_asked_to_stop(
    tmp_path: Path,
) -> None:
    made = Children(make_config(actor={"count": 1}), RunFolder(tmp_path))
    made.actors[0].command = always(sys.executable, "-S", "-c", SENT_HOME, str(tmp_path / "starts"))
    with hub_runs(tmp_path) as hub, anyio.fail_after(20), made:  # it finishes what a killed learner left to it
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(made.keep)
            await holds(lambda: (tmp_path / "starts").is_file())
            made.drain()
        assert hub.poll() is None and not (tmp_path / "logs" / "learner.out").exists()
