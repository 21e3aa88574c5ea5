"""What the hub sees being waited for: weights, actors, the trainer, a batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from learner.hub.core import Hub
from matpo.waits import Condition, waiting
from protocols.messages import Wait

TRAINER_SILENT_S: Final = 10.0
"""It sends a beat every two seconds."""


def conditions(hub: Hub, now_s: float) -> Iterator[Condition]:
    """What is being waited for at this moment, as far as the hub itself can see."""
    finished = hub.batches.step >= hub.config.run.steps
    if hub.weights.latest is None:
        yield waiting("first_weights")
    elif not _trainer_lives(hub, now_s) and not finished and hub.draining is None:
        stage = hub.trainer_waits[0].what if hub.trainer_waits else "nothing"
        yield waiting("trainer", since_s=hub.trainer_heard_s, stage=stage)
    if not hub.roster.live(now_s) and hub.draining is None:
        yield waiting("actors")
    for actor in hub.roster.silent(now_s):
        yield waiting("actor", since_s=actor.heard_s, actor=actor.actor_id)
    if hub.wanted_step is not None and _trainer_lives(hub, now_s):
        have, need = hub.batches.complete_groups(), hub.config.learner.groups_per_step
        yield waiting("batch", who="trainer", step=hub.wanted_step, have=have, need=need)


def reported_waits(hub: Hub, now_s: float) -> Iterator[Wait]:
    """What trainer and actors said they wait for, those that are silent left out."""
    if _trainer_lives(hub, now_s):
        yield from hub.trainer_waits
    for actor in hub.roster.live(now_s):
        yield from actor.waits


def _trainer_lives(hub: Hub, now_s: float) -> bool:
    return now_s - hub.trainer_heard_s <= TRAINER_SILENT_S
