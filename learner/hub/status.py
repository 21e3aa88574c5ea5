"""The hub's line in the metrics file, every heartbeat: ledger, actors, throughput, staleness, waits, refusals."""

from __future__ import annotations

from dataclasses import dataclass

from learner.hub.bias import audit_journal
from learner.hub.conditions import conditions, reported_waits
from learner.hub.core import Hub
from learner.hub.figures import read_figures
from learner.hub.journal import Journal
from learner.hub.ledger import Ledger, read_ledger
from matpo.length_bias import BiasAudit
from matpo.waits import WaitBook
from protocols.messages import Wait
from protocols.records import Record


class ActorStatus(Record):
    """One actor as its last heartbeat described it."""

    actor_id: str
    version: int
    live_episodes: int
    outbox_trees: int
    wanted: int
    silent_s: float


class HubStatus(Record):
    """A line of stage `hub`."""

    step: int
    steps: int
    version: int
    """Newest published weights; -1 before the first."""
    lineage: int
    actors: int
    """Heard of lately."""
    known_actors: tuple[ActorStatus, ...]
    leased_episodes: int
    """Training and evaluation."""
    pending_trees: int
    trained_trees: int
    filtered_trees: int
    ledger: Ledger
    in_flight: int
    admissible: int
    evaluation: str | None
    """The evaluation round going on."""
    evaluation_left: int
    """Episodes missing in it."""
    episodes_per_s: float
    sampled_tokens_per_s: float
    prefix_hit_rate: float | None
    """Share of all prompt tokens whose keys and values the engines still had."""
    reward_mean: float | None
    """Of the trees in the last two batches."""
    staleness_mean: float | None
    staleness_max: int | None
    bias: BiasAudit
    """Whether long or hard episodes are missing from what is trained on; as of the last step."""
    weights_served_bytes: int
    """Weight objects handed out in chunks since this hub started."""
    waits: tuple[Wait, ...]
    refused: dict[str, int]


@dataclass(slots=True)
class StatusReporter:
    """Takes readings and turns differences between them into rates."""

    hub: Hub
    journal: Journal
    steps: int
    waits: WaitBook
    refused_by_sockets: tuple[dict[str, int], ...]
    last_s: float
    last_trees: int
    last_tokens: int
    _audited: tuple[int, BiasAudit] | None = None
    """Step, and what was found then."""

    def read(self, now_s: float) -> HubStatus:
        """The status at this moment, inside a transaction or snapshot of the caller."""
        hub, journal = self.hub, self.journal
        ledger = read_ledger(journal)
        elapsed_s = max(now_s - self.last_s, 1e-6)
        tokens = journal.counter("sampled_tokens")
        episodes_per_s = (ledger.trees - self.last_trees) / elapsed_s
        tokens_per_s = (tokens - self.last_tokens) / elapsed_s
        self.last_s, self.last_trees, self.last_tokens = now_s, ledger.trees, tokens
        actors = hub.roster.everyone()
        own = self.waits.update(conditions(hub, now_s), now_s)
        recent = read_figures(journal, first=hub.batches.step - 1, last=hub.batches.step)
        reward, staleness = recent.part_mean("total"), recent.staleness_mean
        current = journal.row("SELECT name FROM rounds WHERE finished_at IS NULL ORDER BY began_at LIMIT 1")
        left = journal.number("SELECT COUNT(*) FROM groups WHERE purpose = 'eval' AND state = 'open'")
        latest, lineage = hub.weights.latest, hub.batches.lineage
        return HubStatus(
            step=hub.batches.step,
            steps=self.steps,
            version=-1 if latest is None else latest.version,
            lineage=-1 if lineage is None else lineage,
            actors=len(hub.roster.live(now_s)),
            leased_episodes=journal.number("SELECT COUNT(*) FROM episodes WHERE lease_id IS NOT NULL"),
            pending_trees=ledger.pending,
            trained_trees=ledger.trained,
            filtered_trees=ledger.filtered,
            known_actors=tuple(
                ActorStatus(
                    actor_id=actor.actor_id,
                    version=actor.version,
                    live_episodes=actor.live_episodes,
                    outbox_trees=actor.outbox_trees,
                    wanted=actor.wanted,
                    silent_s=round(now_s - actor.heard_s, 3),
                )
                for actor in actors
            ),
            ledger=ledger,
            in_flight=hub.leases.in_flight(),
            admissible=hub.granter.admissible(),
            evaluation=None if current is None else str(current[0]),
            evaluation_left=left,
            episodes_per_s=round(episodes_per_s, 3),
            sampled_tokens_per_s=round(tokens_per_s, 3),
            prefix_hit_rate=hub.roster.prefix_hit_rate,
            reward_mean=None if reward is None else round(reward, 6),
            staleness_mean=None if staleness is None else round(staleness, 6),
            staleness_max=recent.staleness_max,
            bias=self._bias(),
            weights_served_bytes=hub.weights.served_bytes,
            waits=(*own, *reported_waits(hub, now_s)),
            refused=self._refused(),
        )

    def _bias(self) -> BiasAudit:
        step = self.hub.batches.step
        if self._audited is None or self._audited[0] != step:
            self._audited = step, audit_journal(self.journal)
        return self._audited[1]

    def _refused(self) -> dict[str, int]:
        total: dict[str, int] = {}
        for source in (self.hub.refused, *self.refused_by_sockets):
            for reason, count in source.items():
                total[reason] = total.get(reason, 0) + count
        return total
