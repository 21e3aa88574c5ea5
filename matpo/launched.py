"""Which of several trainer processes this is, as its launcher says it: `accelerate launch`, `torchrun` and our own
launcher set the same variables."""

from __future__ import annotations

import os

from matpo.errors import PAUSED


def launched_ranks() -> int:
    """How many processes train together, on all machines; 1 where no launcher says otherwise."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_rank() -> int:
    """This process among them, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Among those of this machine, from 0: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def rank_name(rank: int) -> str:
    """What a rank's log is called: `trainer`, and beyond the first `trainer-1`, `trainer-2`, …"""
    return f"trainer-{rank}" if rank else "trainer"


def restarts() -> int:
    """How often the launcher has started all ranks again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def code_for_launcher(code: int) -> int:
    """The exit code of a process that a launcher started. A launcher takes any but 0 for a failure and starts all ranks
    again while it may, so a run that paused ends with 0 then."""
    most = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    return 0 if code == PAUSED and restarts() < most else code
