"""The processes of a run, found by what they are: they may be orphans, or of a later life."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import anyio
import psutil

from tests.chaos.faults import Role

GONE = (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied)
LOOK_EVERY_S = 0.2
MODULES: dict[str, Role] = {
    "learner": "learner",
    "learner.hub": "hub",
    "learner.trainer": "trainer",
    "actors": "actor",
    "matpo": "run",
}


def all_below(parent: Path) -> Iterator[tuple[Role, psutil.Process]]:
    """Every process of ours whose command line names a path below `parent`, and the tool servers of its actors with
    the one that would end these (`actors.tools.heir`)."""
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        with suppress(*GONE):
            role = role_of(process.cmdline(), parent)
            if role is None:
                continue
            yield role, process
            if role == "actor":
                yield from (("tool server", child) for child in process.children(recursive=True))


def role_of(command: Sequence[str], parent: Path) -> Role | None:
    """What a command line is in a run below `parent`."""
    if "-m" not in command or not any(str(parent) in word for word in command):
        return None
    module = command[command.index("-m") + 1 : command.index("-m") + 2]
    return MODULES.get(module[0]) if module else None


def with_role(parent: Path, role: Role) -> list[psutil.Process]:
    """Those of one role, oldest first."""
    return sorted((p for found, p in all_below(parent) if found == role), key=lambda p: p.pid)


async def until(holds: Callable[[], bool]) -> None:
    """Look again and again: what other processes do can only be looked at. Bound it with a deadline of your own."""
    while True:
        if holds():
            return
        await anyio.sleep(LOOK_EVERY_S)
