"""What the hub does with each message: decide, write down, and only then answer. No sockets and no clock in here.

The caller opens a transaction, hands in the messages it has, calls `advance`, commits, and sends what `take_outgoing`
returns: nothing is promised to anybody before it is on disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from learner.hub.admission import Admission
from learner.hub.batches import Batches, BatchRules, OutOfStep
from learner.hub.evaluation import EvaluationRecord, Evaluator
from learner.hub.grants import Granter
from learner.hub.journal import Journal
from learner.hub.leases import GroupRules, Leases
from learner.hub.roster import KnownActor, Roster
from learner.hub.settled import Settler, is_settled
from learner.hub.tasks import TaskCursor
from learner.hub.weights import Swap, WeightStore
from matpo.config import Config
from protocols.channel import Frame, Received
from protocols.codec import MalformedTree, decode_header, decode_tree
from protocols.messages import (
    PROTOCOL,
    Ack,
    ActorMessage,
    Batch,
    BatchRequest,
    Cancel,
    ChunkRequest,
    Drain,
    Goodbye,
    Heartbeat,
    Hello,
    HubMessage,
    Lease,
    LeaseRequest,
    NotYet,
    Ok,
    Publish,
    PullHello,
    Refuse,
    RefuseReason,
    StepDone,
    TrainerBeat,
    TrainerHello,
    TrainerMessage,
    TrainerWelcome,
    TreeUpload,
    Wait,
    WeightsLoaded,
    Welcome,
)
from protocols.records import Task, lineage_of, step_of

Side = Literal["actors", "trainer"]

BATCH_PATIENCE_S: Final = 1.0
"""A batch request is answered with `NotYet` after so long; well before the trainer would ask again."""
SILENT_HEARTBEATS: Final = 4
"""An actor that missed so many heartbeats is given nothing new."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One message to send after the commit."""

    side: Side
    peer: bytes
    message: HubMessage
    frames: Sequence[Frame] = ()


@dataclass(frozen=True, slots=True)
class Asker:
    """A trainer that waits for its batch."""

    peer: bytes
    step: int
    since_s: float


class Hub:
    """The hub's state: the journal, and what it may forget (who is connected, who asked)."""

    def __init__(
        self,
        config: Config,
        journal: Journal,
        *,
        run: str,
        weights: Path,
        archive: Path,
        tokenizer: str,
        train: Sequence[Task],
        evaluation: Sequence[Task],
        now_s: float,
    ) -> None:
        """`weights` is the folder of weight files, `archive` the file for what leaves the journal, `tokenizer` the
        digest actors must show, `now_s` monotonic."""
        self.config = config
        self._journal = journal
        self._admission = Admission(config, journal, run, tokenizer)
        rules = GroupRules(
            group_size=config.learner.group_size,
            min_group=config.hub.min_group,
            max_attempts=config.hub.max_attempts,
            filter_zero_variance=config.learner.zero_variance == "resample",
        )
        self.leases = Leases(journal, rules, lease_s=config.hub.lease_s, now_s=now_s)
        batch_rules = BatchRules(
            groups_per_step=config.learner.groups_per_step,
            min_group=config.hub.min_group,
            max_staleness_steps=config.freshness.max_staleness_steps,
        )
        self.batches = Batches(journal, self.leases, batch_rules)
        self.weights = WeightStore(journal, weights)
        self.evaluator = Evaluator(journal, self.leases, config.evaluation, evaluation, steps=config.run.steps)
        self.granter = Granter(
            config,
            leases=self.leases,
            batches=self.batches,
            weights=self.weights,
            cursor=TaskCursor(train, config.run.seed),
        )
        keep = config.hub.keep_trained
        self.settler = None if keep == "all" else Settler(journal, archive=archive if keep == "archive" else None)
        self.roster = Roster(silence_limit_s=SILENT_HEARTBEATS * config.hub.heartbeat_s)
        self.refused: Counter[str] = Counter()
        """Messages refused here, by reason."""
        self.draining: str | None = None
        """Why no more work is given out, once it is so."""
        self.swaps: list[Swap] = []
        """Weights that engines took since this list was emptied."""
        self._outgoing: list[Outgoing] = []
        self.asker: Asker | None = None
        """The trainer, while it waits for an answer."""
        self.wanted_step: int | None = None
        """The step whose batch the trainer lacks; `NotYet` in between does not end that wait."""
        self.trainer_heard_s = now_s
        """Monotonic time of the trainer's last message."""
        self.trainer_waits: tuple[Wait, ...] = ()
        """What it was busy with by then."""

    def take_outgoing(self) -> list[Outgoing]:
        """What to send now that the transaction is on disk."""
        outgoing, self._outgoing = self._outgoing, []
        return outgoing

    @property
    def complete(self) -> bool:
        """Whether every step is trained, its weights published and the last evaluation in."""
        latest, steps = self.weights.latest, self.config.run.steps
        published = latest is not None and step_of(latest.version) >= steps
        same = latest is not None and lineage_of(latest.version) == self.batches.lineage
        return published and same and self.batches.step >= steps and self.evaluator.all_finished()

    def handle(self, side: Side, received: Received, *, now_s: float, at: float) -> None:
        """Act on one message (at Unix time `at`)."""
        message = received.message
        if isinstance(message, TrainerMessage):
            if side == "trainer":
                self._handle_trainer(received.peer, message, now_s=now_s, at=at)
            else:
                self._refuse(side, received.peer, "unexpected", f"{message.kind} belongs on the trainer's socket")
        elif side == "actors":
            self._handle_actor(received, message, now_s=now_s, at=at)
        else:
            self._refuse(side, received.peer, "unexpected", f"{message.kind} belongs on the actors' socket")

    def undelivered(self, outgoing: Outgoing) -> None:
        """A message found its peer gone: a lease in it goes back."""
        if isinstance(outgoing.message, Lease):
            self.leases.end(outgoing.message.lease_id, "returned")
        if outgoing.side == "actors":
            self.roster.pullers.discard(outgoing.peer)
            actor = self.roster.at(outgoing.peer)
            if actor is not None:
                actor.wanted = 0

    def advance(self, *, now_s: float, at: float) -> list[EvaluationRecord]:
        """Do everything that is due now; returns the evaluation rounds that finished."""
        for lease_id in self.leases.overdue(now_s):
            self.leases.end(lease_id, "expired")
        self.roster.forget_gone(now_s)
        if self.draining is None:
            for actor, lease in self.granter.give(self.roster.live(now_s), now_s=now_s, at=at):
                self._send("actors", actor.peer, lease)
        self._answer_asker(now_s)
        if self.settler is not None:
            self.settler.settle_some()
        return self.evaluator.finish_played(at=at)

    def drain(self, reason: str) -> None:
        """Give out no more work, take back what is leased, and send every actor home."""
        self.draining = reason
        for actor in self.roster.everyone():
            self._return_leases(actor)
            self._send("actors", actor.peer, Drain(reason=reason))
        for puller in self.roster.pullers:
            self._send("actors", puller, Drain(reason=reason))

    def _handle_actor(self, received: Received, message: ActorMessage, *, now_s: float, at: float) -> None:
        peer = received.peer
        actor = self.roster.at(peer)
        if isinstance(message, Hello | PullHello):
            self._welcome(peer, message, received.key, now_s=now_s)
            return
        if isinstance(message, ChunkRequest) and peer in self.roster.pullers:
            self._send_chunk(peer, message)
            return
        if actor is None:
            about = message.tree_id if isinstance(message, TreeUpload) else ""
            self._refuse("actors", peer, "unknown_peer", "say hello first; the hub may have been restarted", about)
            return
        actor.heard_s = now_s
        match message:
            case LeaseRequest(episodes=episodes):
                actor.wanted = episodes
            case TreeUpload(tree_id=tree_id):
                self._take_tree(actor, tree_id, received.frames, at=at)
            case Heartbeat(leases=leases):
                self.leases.renew(leases, actor.actor_id, now_s=now_s)
                for lease_id in self.roster.heartbeat(actor, message):
                    self.leases.end(lease_id, "expired")
                self._announce(peer)
            case ChunkRequest():
                self._send_chunk(peer, message)
            case WeightsLoaded(version=version):
                actor.version = version
                self._note_swap(actor, message, at=at)
            case Goodbye():
                self._return_leases(actor)
                self.roster.forget(peer)

    def _welcome(self, peer: bytes, hello: Hello | PullHello, key: str | None, *, now_s: float) -> None:
        refusal = self._admission.refusal(hello, key, draining=self.draining)
        if refusal is not None:
            self._refuse("actors", peer, refusal.reason, refusal.detail)
            return
        if isinstance(hello, Hello):
            self.roster.hello(peer, hello, self.leases.live(hello.actor_id), now_s)
        else:
            self.roster.pullers.add(peer)
        self._send("actors", peer, Welcome(run=self._admission.run, heartbeat_s=self.config.hub.heartbeat_s))
        if isinstance(hello, Hello):
            self._announce(peer)

    def _take_tree(self, actor: KnownActor, tree_id: str, frames: Sequence[Frame], *, at: float) -> None:
        peer = actor.peer
        if self.leases.holds(tree_id):
            self._send("actors", peer, Ack(tree_id=tree_id))
            return
        try:
            if not frames:
                raise MalformedTree("a tree upload without frames")
            header = decode_header(frames[0])
            decode_tree(frames)  # a tree the trainer could not read must not enter the journal
            if header.tree_id != tree_id:
                raise MalformedTree(f"upload of tree {tree_id!r} holds tree {header.tree_id!r}")
        except MalformedTree as error:
            self._refuse("actors", peer, "malformed", str(error), tree_id)
            return
        unknown = [s.version for s in header.weights if not self.weights.knows(s.version, s.digest)]
        if unknown:
            detail = f"tree holds tokens of weights {unknown} with a digest this run never published"
            self._refuse("actors", peer, "unknown_weights", detail, tree_id)
        elif is_settled(self._journal, header):
            self._journal.count_up("late")
            self._send("actors", peer, Ack(tree_id=tree_id))
        elif not self.leases.knows(header, actor.actor_id):
            detail = (
                f"lease {header.lease_id!r} of group {header.group_id!r} was not given to {actor.actor_id} in this run"
            )
            self._refuse("actors", peer, "unknown_lease", detail, tree_id)
        else:
            cancelled = self.leases.arrive(header, frames, at=at)
            self._send("actors", peer, Ack(tree_id=tree_id))
            holder = None if cancelled is None else self.roster.named(cancelled.actor_id)
            if cancelled is not None and holder is not None:
                reason = "an earlier lease delivered after all"
                self._send("actors", holder.peer, Cancel(lease_id=cancelled.lease_id, reason=reason))

    def _return_leases(self, actor: KnownActor) -> None:
        for lease_id in self.leases.live(actor.actor_id):
            self.leases.end(lease_id, "returned")

    def _note_swap(self, actor: KnownActor, loaded: WeightsLoaded, *, at: float) -> None:
        swap = self.weights.swap(loaded, actor_id=actor.actor_id, at=at)
        if swap is not None:
            self.swaps.append(swap)
            return
        detail = f"weights {loaded.version} with digest {loaded.digest} were never published; pull them again"
        self._refuse("actors", actor.peer, "unknown_weights", detail)

    def _send_chunk(self, peer: bytes, request: ChunkRequest) -> None:
        piece = self.weights.chunk(request)
        if isinstance(piece, Refuse):
            self._refuse("actors", peer, piece.reason, piece.detail, piece.about)
        else:
            self._outgoing.append(Outgoing("actors", peer, piece[0], (piece[1],)))

    def _announce(self, peer: bytes) -> None:
        ready = self.weights.announcement()
        if ready is not None:
            self._send("actors", peer, ready)

    def _handle_trainer(self, peer: bytes, message: TrainerMessage, *, now_s: float, at: float) -> None:
        self.trainer_heard_s = now_s
        try:
            match message:
                case TrainerBeat(waits=waits):
                    self.trainer_waits = waits
                    self._send("trainer", peer, Ok())
                case TrainerHello():
                    self._welcome_trainer(peer, message, at=at)
                case BatchRequest(step=step, settled=settled):
                    if settled >= step:
                        raise OutOfStep(f"a batch was asked for step {step} with a checkpoint of step {settled}")
                    if self.settler is not None:
                        self.settler.allow(settled)
                    self.asker, self.wanted_step = Asker(peer, step, now_s), step
                case StepDone():
                    self.batches.done(message, at=at)
                    self._send("trainer", peer, Ok())
                case Publish():
                    self._publish(peer, message, at=at)
        except OutOfStep as error:
            self._refuse("trainer", peer, "unexpected", str(error))

    def _welcome_trainer(self, peer: bytes, hello: TrainerHello, *, at: float) -> None:
        expected = self.config.shared_digest
        if hello.protocol != PROTOCOL:
            detail = f"trainer speaks protocol {hello.protocol}, this hub {PROTOCOL}; stop what is left of an old run"
            self._refuse("trainer", peer, "wrong_protocol", detail)
        elif hello.config_digest != expected:
            detail = f"trainer has config {hello.config_digest}, this run {expected}; start both from RUN/config.json"
            self._refuse("trainer", peer, "wrong_config", detail)
        else:
            self.asker, self.wanted_step, self.trainer_waits = None, None, ()
            self.weights.delete_strays()
            self._send("trainer", peer, TrainerWelcome(lineage=self.batches.begin_lineage(hello.step, at=at)))

    def _publish(self, peer: bytes, message: Publish, *, at: float) -> None:
        if not self.weights.knows(message.version, message.digest):  # said twice, it changes nothing
            self.batches.require_lineage(lineage_of(message.version))
        before = self.weights.latest
        refusal = self.weights.publish(message, at=at)
        if refusal is not None:
            self._refuse("trainer", peer, refusal.reason, refusal.detail, refusal.about)
            return
        self._send("trainer", peer, Ok())
        if self.weights.latest is not before:
            self.evaluator.start_due(step_of(message.version), at=at)
            for actor in self.roster.everyone():
                self._announce(actor.peer)

    def _answer_asker(self, now_s: float) -> None:
        """Send the trainer its batch as soon as there is one, or tell it what is missing."""
        asker = self.asker
        if asker is None:
            return
        try:
            groups = self.batches.plan(asker.step)
        except OutOfStep as error:
            self.asker = self.wanted_step = None
            self._refuse("trainer", asker.peer, "unexpected", str(error))
            return
        if groups is not None:
            trees = self.batches.frames(groups)
            message = Batch(step=asker.step, frame_counts=tuple(len(frames) for frames in trees))
            self._outgoing.append(
                Outgoing("trainer", asker.peer, message, tuple(frame for frames in trees for frame in frames))
            )
            self.asker = self.wanted_step = None
        elif now_s - asker.since_s >= BATCH_PATIENCE_S:
            self._send("trainer", asker.peer, NotYet())
            self.asker = None

    def _send(self, side: Side, peer: bytes, message: HubMessage) -> None:
        self._outgoing.append(Outgoing(side, peer, message))

    def _refuse(self, side: Side, peer: bytes, reason: RefuseReason, detail: str, about: str = "") -> None:
        self.refused[reason] += 1
        self._send(side, peer, Refuse(reason=reason, detail=detail, about=about))
