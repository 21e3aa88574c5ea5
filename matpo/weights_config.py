"""How an actor gets the learner's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, model_validator

from matpo.section import Section
from protocols.keys import checked_public


class ActorWeights(Section):
    """Sources that are asked before the hub, which always serves; and where the copy lies that actors share."""

    folder: Path | None = None
    """The learner's RUN/weights, on a file system this machine shares: objects are read there. `matpo run` sets it."""
    relay: str | None = None
    """tcp://HOST:PORT of a `matpo-relay`: bulk bytes come from it, everything else from the hub."""
    relay_key: Annotated[str, AfterValidator(checked_public)] | None = None
    """The relay's public key, as `matpo keys show` prints it there; needed where the run uses keys."""
    memory: Path | None = None
    """Folder for the copy all actors of this run and machine map, with room for two sets of weights; None: /dev/shm, or
    the system's temporary folder."""

    @model_validator(mode="after")
    def _key_of_a_relay(self) -> ActorWeights:
        if self.relay_key is not None and self.relay is None:
            raise ValueError("relay_key has no effect without a relay; set relay, or remove relay_key")
        return self
