"""Gives waiting work to actors: evaluation first, then unfinished groups, then new ones as far as freshness admits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from learner.hub.batches import Batches
from learner.hub.leases import Grant, Leases
from learner.hub.roster import KnownActor
from learner.hub.tasks import TaskCursor
from learner.hub.weights import WeightStore
from matpo.config import Config
from matpo.freshness import admissible
from protocols.messages import Lease
from protocols.records import lineage_of, step_of, version_of


@dataclass(slots=True)
class _Room:
    """How many more episodes an actor takes."""

    actor: KnownActor
    free: int


class Granter:
    """Turns work that waits and actors that want it into leases, inside the caller's transaction."""

    def __init__(
        self, config: Config, *, leases: Leases, batches: Batches, weights: WeightStore, cursor: TaskCursor
    ) -> None:
        self._config = config
        self._leases = leases
        self._batches = batches
        self._weights = weights
        self._cursor = cursor

    def admissible(self) -> int:
        """Training episodes that may be admitted now."""
        latest, step = self._weights.latest, self._batches.step
        return admissible(
            version=min(step, step_of(latest.version)) if latest is not None else 0,
            step=step,
            steps=self._config.run.steps,
            eta=self._config.freshness.eta,
            trees_per_step=self._config.learner.trees_per_step,
            in_flight=self._leases.in_flight(),
        )

    def give(self, actors: list[KnownActor], *, now_s: float, at: float) -> list[tuple[KnownActor, Lease]]:
        """Lease what can be leased, always to the actor with most room."""
        latest = self._weights.latest
        rooms = [_Room(a, min(a.wanted, a.capacity - self._leases.leased_to(a.actor_id))) for a in actors if a.wanted]
        if latest is None or not any(room.free > 0 for room in rooms):
            return []
        given: list[tuple[KnownActor, Lease]] = []
        for group, waiting in self._work(latest.version, at=at):
            left = waiting
            while left:
                room = max(rooms, key=lambda candidate: candidate.free)
                if room.free <= 0:
                    return given
                grant = self._leases.grant(group, room.actor.actor_id, most=room.free, now_s=now_s, at=at)
                left -= len(grant.episodes)
                room.free -= len(grant.episodes)
                room.actor.wanted -= len(grant.episodes)
                given.append((room.actor, self._lease(grant, latest.version)))
            if all(room.free <= 0 for room in rooms):
                return given  # before another group is opened for nobody
        return given

    def _work(self, version: int, *, at: float) -> Iterator[tuple[int, int]]:
        """Groups with waiting episodes and how many; new groups are opened only as they are asked for."""
        lineage, step = self._batches.lineage, step_of(version)
        # Until a resumed trainer publishes, the newest weights are ahead of it; a round for later steps can wait.
        reached = step if lineage_of(version) == lineage else min(step, self._batches.step)
        yield from self._leases.waiting_groups("eval", upto_step=reached).items()
        if self._batches.step < self._config.run.steps:
            yield from self._leases.waiting_groups("train", upto_step=0).items()
        size = self._config.learner.group_size
        while self.admissible() >= size:
            task = self._cursor.task(self._leases.train_groups())
            yield self._leases.open_group(task, purpose="train", round_name=None, episodes=size, at=at), size

    def _lease(self, grant: Grant, version: int) -> Lease:
        step = step_of(version)
        # One step of grace, so that actors need not stand still while they pull new weights.
        grace = min(1, self._config.freshness.eta)
        oldest = step - grace if grant.purpose == "train" else min(grant.round_step, step)
        return Lease(
            lease_id=grant.lease_id,
            group_id=grant.group_id,
            task=grant.task,
            episodes=grant.episodes,
            purpose=grant.purpose,
            min_version=version_of(lineage=lineage_of(version), step=max(0, oldest)),
            expires_s=self._config.hub.lease_s,
        )
