"""How an actor gets the learner's weights."""

from __future__ import annotations

from pathlib import Path

from matpo.section import Section


class ActorWeights(Section):
    """Sources that are asked before the hub, which always serves; and where the copy lies that actors share."""

    folder: Path | None = None
    """The learner's RUN/weights, on a file system this machine shares: objects are read there. `matpo run` sets it."""
    relay: str | None = None
    """tcp://HOST:PORT of a `matpo-relay`: bulk bytes come from it, everything else from the hub."""
    memory: Path | None = None
    """Folder for the copy all actors of this run and machine map, with room for two sets of weights; None: /dev/shm, or
    the system's temporary folder."""
