"""The keeper of a command and the command's view of it, with small scripts for commands."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import anyio
import psutil
import pytest
from structlog.testing import capture_logs

from matpo.errors import UserError
from matpo.keeper import Kept, Patience, always

OWNED = """
import os, signal, sys, time
from pathlib import Path
from matpo.owner import Owner
name, here = sys.argv[1], Path(sys.argv[2])
owner = Owner.at_standard_input(owned="--owned" in sys.argv, leave_limit_s=0.3)
def note(word):
    with (here / "order").open("a") as file:
        file.write(f"{name} {word}\\n")
def leave(*_):
    note("leaves")
    sys.exit(130)
"""
OBEDIENT = OWNED + "signal.signal(signal.SIGTERM, leave)\n"
DEAF = OWNED + "signal.signal(signal.SIGTERM, lambda *_: note('hears'))\n"
UP = "note('is up')\nwhile True: time.sleep(0.02)\n"
KEEPER = """
import os, sys
from pathlib import Path
import anyio
from learner.supervisor import Supervisor
from matpo.keeper import Kept, always
from matpo.owner import UNOWNED
here, hub, trainer = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
def kept(name, source, outlived_by=()):
    command = always(sys.executable, "-c", source, name, str(here))
    return Kept(name, command, output=here / f"{name}.out", environment=os.environ, outlived_by=outlived_by)
first = kept("hub", hub)
anyio.run(Supervisor(hub=first, trainer=kept("trainer", trainer, [first]), owner=UNOWNED).run)
"""


def kept(folder: Path, source: str, *, first_s: float = 120.0, silent_s: float = 15.0, frozen_s: float = 45.0) -> Kept:
    return Kept(
        "child",
        always(sys.executable, "-c", source, "child", str(folder)),
        output=folder / "child.out",
        environment=os.environ,
        patience=Patience(pauses_s=(0.01,), first_s=first_s, silent_s=silent_s, frozen_s=frozen_s),
    )


def order(folder: Path) -> list[str]:
    noted = folder / "order"
    return noted.read_text().splitlines() if noted.is_file() else []


async def holds(condition: Callable[[], bool]) -> None:
    """Look again and again: what other processes do can only be looked at."""
    with anyio.fail_after(60):
        while True:
            if condition():
                return
            await anyio.sleep(0.02)


async def until(folder: Path, lines: int) -> list[str]:
    """What the children noted, once it is so many lines."""
    await holds(lambda: len(order(folder)) >= lines)
    return order(folder)


async def test_a_command_that_falls_silent_is_named_then_killed_and_started_again(tmp_path: Path) -> None:
    source = OBEDIENT + "note('is up')\nif len((here / 'order').read_text().splitlines()) == 2: sys.exit(0)\n"
    source += "owner.beat()\nwhile True: time.sleep(0.02)\n"
    with capture_logs() as logs, kept(tmp_path, source, silent_s=0.1, frozen_s=0.2) as child, anyio.fail_after(60):
        assert await child.keep(anyio.Event()) == 0
    assert order(tmp_path) == ["child is up"] * 2
    events = [(line["event"], line.get("who") or line.get("child")) for line in logs]
    assert events.index(("stall", "child")) < events.index(("frozen, killed", "child"))


async def test_a_command_that_stands_still_and_goes_on_is_left_alone(tmp_path: Path) -> None:
    source = OBEDIENT + "note('is up')\n"
    source += "while not (here / 'done').exists(): time.sleep(0.02)"
    with capture_logs() as logs, kept(tmp_path, source, silent_s=2.0, frozen_s=60.0) as child, anyio.fail_after(60):

        def logged(event: str) -> bool:
            return any(line["event"] == event for line in logs)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(child.keep, anyio.Event())
            await until(tmp_path, 1)
            child.signal(signal.SIGSTOP)
            await holds(lambda: logged("stall"))
            child.signal(signal.SIGCONT)
            await holds(lambda: logged("goes on"))
            (tmp_path / "done").touch()
    assert order(tmp_path) == ["child is up"]


async def test_a_command_frozen_before_its_first_beat_is_killed_and_started_again(tmp_path: Path) -> None:
    early = "import os, signal, sys\nfrom pathlib import Path\nonce = Path(sys.argv[2]) / 'once'\n"
    early += "if not once.exists():\n    once.touch()\n    os.kill(os.getpid(), signal.SIGSTOP)\n"
    with (
        capture_logs() as logs,
        kept(tmp_path, early + OBEDIENT + "note('is up')", first_s=3.0) as child,
        anyio.fail_after(60),
    ):
        assert await child.keep(anyio.Event()) == 0
    assert order(tmp_path) == ["child is up"]
    assert [line["event"] for line in logs if line["event"] in ("stall", "frozen, killed")] == [
        "stall",
        "frozen, killed",
    ]


async def test_a_command_with_something_to_fix_is_not_tried_again(tmp_path: Path) -> None:
    source = OBEDIENT + "note('is up')\nprint('error: give it a name', file=sys.stderr)\nsys.exit(2)"
    with kept(tmp_path, source) as child, pytest.raises(UserError, match="child could not go on: give it a name"):
        await child.keep(anyio.Event())
    assert order(tmp_path) == ["child is up"]


async def orphaned(folder: Path, *, hub: str, trainer: str) -> list[psutil.Process]:
    """Start a supervisor with these children and kill it once both are up; returns the orphans."""
    keeper = await anyio.open_process([sys.executable, "-c", KEEPER, str(folder), hub, trainer])
    await until(folder, 2)
    orphans = psutil.Process(keeper.pid).children()
    assert len(orphans) == 2
    keeper.kill()
    await keeper.aclose()
    return orphans


async def test_without_their_keeper_the_trainer_leaves_first_and_then_the_hub(tmp_path: Path) -> None:
    orphans = await orphaned(tmp_path, hub=OBEDIENT + UP, trainer=OBEDIENT + UP)
    assert (await until(tmp_path, 4))[2:] == ["trainer leaves", "hub leaves"]
    gone, alive = psutil.wait_procs(orphans, timeout=30)
    assert (len(gone), alive) == (2, [])


async def test_who_does_not_leave_without_a_keeper_ends_itself(tmp_path: Path) -> None:
    orphans = await orphaned(tmp_path, hub=OBEDIENT + UP, trainer=DEAF + UP)
    assert (await until(tmp_path, 4))[2:] == ["trainer hears", "hub leaves"]
    gone, alive = psutil.wait_procs(orphans, timeout=30)
    assert (len(gone), alive) == (2, [])
