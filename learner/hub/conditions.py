"""What the hub sees being waited for: weights, actors, heartbeats, a batch, a step."""

from __future__ import annotations

from collections.abc import Iterator

from learner.hub.core import Hub
from learner.hub.waits import Condition


def conditions(hub: Hub, now_s: float) -> Iterator[Condition]:
    """What is being waited for at this moment."""
    patience_s = 60.0
    if hub.weights.latest is None:
        remedy = "the trainer loads its model; if this lasts, see logs/trainer.jsonl and logs/learner.out"
        yield Condition("hub", "the first weights", patience_s, remedy)
    if not hub.roster.live(now_s) and hub.draining is None:
        yield Condition("hub", "an actor", patience_s, "start matpo-actor with --hub and the address in hub.json")
    for actor in hub.roster.silent(now_s):
        remedy = f"see logs/{actor.actor_id}.jsonl; its leases are handed out again after hub.lease_s"
        yield Condition("hub", f"a heartbeat of {actor.actor_id}", hub.config.hub.lease_s, remedy)
    if hub.asker is not None:
        have, need = hub.batches.complete_groups(), hub.config.learner.groups_per_step
        remedy = f"{have} of {need} groups are complete; start more actors or raise freshness.eta"
        yield Condition("trainer", f"the batch of step {hub.asker.step}", patience_s, remedy)
    elif hub.training is not None:
        remedy = "the trainer computes; if this lasts, see logs/trainer.jsonl or lower learner.micro_batch_tokens"
        yield Condition("hub", f"step {hub.training} of the trainer", 300.0, remedy)
