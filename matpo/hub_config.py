"""Config of the hub, and of how fresh the data must be that it hands out."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from matpo.section import Section
from protocols.limits import MAX_MESSAGE_BYTES


class Hub(Section):
    """Leases, journal and weights."""

    listen: str = "tcp://127.0.0.1:0"
    """Where actors connect; port 0 takes a free one (it is printed and written to the run's folder)."""
    lease_s: float = Field(default=60.0, gt=0)
    """A lease no heartbeat renewed for so long is handed out again."""
    heartbeat_s: float = Field(default=2.0, gt=0)
    max_attempts: int = Field(default=3, ge=1)
    """Leases of a group before it is closed with the trees it has."""
    min_group: int = Field(default=2, ge=2)
    """Fewest scored trees for a group to be trained on."""
    max_message_bytes: int = Field(default=MAX_MESSAGE_BYTES, ge=2**16)
    max_messages_per_s: float = Field(default=5_000, gt=0)
    """From one actor; more is refused and counted. Twice as many may come at once after a pause."""
    max_bytes_per_s: float = Field(default=256 * 2**20, gt=0)
    """From one actor, likewise."""
    key_dir: Path | None = None
    """CURVE keys (`matpo keys new`); required to listen beyond this machine."""
    keyframe_every_steps: int = Field(default=20, ge=1)
    keep_trained: Literal["all", "archive", "drop"] = "all"
    """What becomes of episodes that every kept checkpoint contains: they stay in the journal, move to
    RUN/archive.sqlite, or go; with the last two the journal stops growing (and `drop` leaves nothing to replay)."""


class Freshness(Section):
    """How far data may lag behind the weights (design §6)."""

    eta: int = Field(default=2, ge=0)
    """Admission bound: episodes start while admitted < (version + eta + 1) · trees_per_step."""
    max_staleness_steps: int = Field(default=16, ge=0)
    """Trees with an older token are filtered and counted."""
