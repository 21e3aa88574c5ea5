"""The real hub and the real actor, ready to be attacked: each says what became of a message and what it changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from actors.engines.engine import EngineHealth, Generation, LoadReport
from actors.outbox import FINAL, Outbox
from actors.play import Player
from actors.session import Session
from actors.watch import Watch
from actors.weights.follow import Follower
from actors.weights.shadow import Shadow
from actors.weights.sources import HubSource, Sources
from benchmarks.fuzz_messages import TASK, Parts, make_tree, to_actor, to_hub
from learner.hub.core import Hub, Side
from learner.hub.journal import Journal
from learner.hub.ledger import checks
from matpo.config import Config, Sampling
from matpo.errors import UserError
from protocols.channel import HubClient, HubInput, Received
from protocols.codec import decode_tree
from protocols.delta import BadDelta, apply_delta, write_delta
from protocols.messages import (
    PROTOCOL,
    Ack,
    ActorMessage,
    Cancel,
    Hello,
    HubMessage,
    Lease,
    LeaseRequest,
    Publish,
    Refuse,
    TrainerHello,
    TreeUpload,
    WeightObject,
    WeightsReady,
    Welcome,
)
from protocols.records import EpisodeTree, Tokens
from protocols.refusals import Frame, read_for_hub, read_from_hub
from protocols.weights import BadWeights, Tensor, Weights, read_keyframe, weights_digest, write_keyframe

MAX_MESSAGE_BYTES: Final = 2**20
DIGEST: Final = "weights-0"
ROWS_CHANGED: Final = "SELECT total_changes()"


class StateChanged(AssertionError):
    """A message that should have changed nothing did."""


def settings() -> Config:
    """A small run."""
    return Config.model_validate(
        {
            "run": {"steps": 4},
            "model": {"path": "models/none"},
            "data": {"train": {"kind": "world"}, "evaluation": {"kind": "world"}},
            "episode": {"roles": {"planner": {"system": "plan"}}},
            "learner": {"groups_per_step": 2, "group_size": 2},
            "evaluation": {"questions": 0},
        }
    )


class HubUnderAttack:
    """A hub with weights, an actor and a lease. Its journal tells by itself how many rows were ever changed."""

    def __init__(self, journal: Journal, folder: Path) -> None:
        config = settings()
        self.journal = journal
        self.hub = Hub(
            config, journal, run="fuzz", weights=folder / "weights", tokenizer="t", train=[TASK], evaluation=[],
            archive=folder / "archive",
            now_s=0.0,
        )  # fmt: skip
        keyframe = WeightObject(name="keyframe-0", kind="keyframe", version=0, base=None, size_bytes=8, digest="x")
        hello = self._hello = Hello(
            protocol=PROTOCOL, actor_id="actor-0", tokenizer_digest="t", config_digest=config.shared_digest, capacity=9
        )
        digest = config.shared_digest
        self._say("trainer", b"trainer", TrainerHello(protocol=PROTOCOL, step=0, config_digest=digest))
        (folder / "weights" / keyframe.name).write_bytes(b"contents")
        self._say("trainer", b"trainer", Publish(version=0, digest=DIGEST, objects=(keyframe,)))
        self._say("actors", b"actor", hello)
        (lease,) = (m for m in self._say("actors", b"actor", LeaseRequest(episodes=2)) if isinstance(m, Lease))
        self._lease_id = lease.lease_id
        self.corpus = to_hub(lease, hello, digest, keyframe, DIGEST)
        self.outcomes: Counter[str] = Counter()

    @classmethod
    @contextmanager
    def open(cls, folder: Path) -> Iterator[HubUnderAttack]:
        with Journal.open(folder / "journal.sqlite") as journal:
            yield cls(journal, folder)

    def attack(self, parts: Parts) -> None:
        """Hand in a message: a tree as the actor that the hub knows, all else as a stranger. Raises `StateChanged`."""
        message = read_for_hub([memoryview(part) for part in parts], max_message_bytes=MAX_MESSAGE_BYTES)
        if isinstance(message, Refuse):
            self.outcomes[message.reason] += 1
            return
        peer, frames = b"actor" if isinstance(message, TreeUpload) else b"stranger", parts[1:]
        known = self.hub.roster.everyone()
        with self.journal.transaction():
            before = self.journal.number(ROWS_CHANGED)
            self.journal.execute("SAVEPOINT attack")
            received = Received(peer, message, tuple(memoryview(frame) for frame in frames))
            self.hub.handle("actors", received, now_s=1.0, at=1.0)
            changed = self.journal.number(ROWS_CHANGED) != before
            self.journal.execute("ROLLBACK TO attack")  # so that the next one meets the same hub
        answers = [outgoing.message for outgoing in self.hub.take_outgoing()]
        if changed:
            if not (isinstance(message, TreeUpload) and self._awaits(message, frames)):
                raise StateChanged(f"{message.kind} changed the journal")
            self.outcomes["taken, being a whole tree"] += 1
        elif any(isinstance(answer, Welcome) for answer in answers):
            self.outcomes["let in, being a hello in order"] += 1
            self.hub.roster.forget(b"stranger")
            self.hub.roster.pullers.discard(b"stranger")
            self._say("actors", b"actor", self._hello)  # without keys, who says hello last has the name
        elif self.hub.roster.everyone() != known:
            raise StateChanged(f"{message.kind} changed who is known")
        else:
            self.outcomes[" and ".join(_named(answer) for answer in answers) or "no answer"] += 1

    def suffer(self, parts: Parts, *, now_s: float) -> None:
        """Hand in a message as the actor that the hub knows, and keep what comes of it. Call `add_up` now and then."""
        message = read_for_hub([memoryview(part) for part in parts], max_message_bytes=MAX_MESSAGE_BYTES)
        if isinstance(message, Refuse):
            self.outcomes[message.reason] += 1
            return
        received = Received(b"actor", message, tuple(memoryview(part) for part in parts[1:]))
        with self.journal.transaction():
            self.hub.handle("actors", received, now_s=now_s, at=now_s)
            self.hub.advance(now_s=now_s, at=now_s)
        for outgoing in self.hub.take_outgoing():
            self.outcomes[_named(outgoing.message)] += 1
        if self.hub.roster.at(b"actor") is None:
            self._say("actors", b"actor", self._hello)  # it had said goodbye

    def add_up(self) -> None:
        """Raises `StateChanged` where a sum of the ledger does not hold."""
        wrong = [check.name for check in checks(self.journal) if not check.holds]
        if wrong:
            raise StateChanged(f"the ledger does not add up: {wrong}")

    def _awaits(self, upload: TreeUpload, frames: Sequence[Frame]) -> bool:
        tree = decode_tree(frames)
        return (tree.tree_id, tree.lease_id) == (upload.tree_id, self._lease_id)

    def _say(self, side: Side, peer: bytes, message: HubInput) -> list[HubMessage]:
        with self.journal.transaction():
            self.hub.handle(side, Received(peer, message, ()), now_s=0.0, at=0.0)
            self.hub.advance(now_s=0.0, at=0.0)
        return [outgoing.message for outgoing in self.hub.take_outgoing()]


def _named(answer: HubMessage) -> str:
    return answer.reason if isinstance(answer, Refuse) else answer.kind


class NoEngine:
    """Holds no weights and samples nothing."""

    version = -1
    digests: Mapping[int, str] = MappingProxyType({})

    async def generate(
        self, tokens: Tokens, sampling: Sampling, *, deadline_s: float, group: str = "", adapter: str | None = ""
    ) -> Generation:
        raise NotImplementedError

    async def load(self, weights: Weights, *, version: int, file: Path | None = None) -> LoadReport:
        raise StateChanged("the engine was given weights")

    async def health(self) -> EngineHealth:
        raise NotImplementedError


class Unheard(HubClient):
    """A connection on which nothing leaves."""

    def __init__(self) -> None:
        self.refused = Counter()

    @property
    def connected(self) -> bool:
        return True

    async def send(self, message: ActorMessage, frames: Sequence[Frame] = ()) -> bool:
        return True


class NoTools:
    """No tool server."""

    def silent(self) -> Sequence[tuple[str, float]]:
        return ()


class ActorUnderAttack:
    """An actor after its welcome: one tree in its outbox, no weights, room for work."""

    def __init__(self, outbox: Outbox, shadow: Shadow) -> None:
        client, engine = Unheard(), NoEngine()
        self._outbox = outbox
        self.player = Player(_never, version=lambda: -1, store=outbox, concurrency=8)
        self.follower = Follower(shadow, engine=engine, sources=Sources(HubSource(client)), reports=client)
        hello = Hello(protocol=PROTOCOL, actor_id="actor-0", tokenizer_digest="t", config_digest="c", capacity=8)
        welcome = Welcome(run="fuzz", heartbeat_s=2.0)
        watch = Watch("actor-0", engine, own=(self.player, self.follower), tools=NoTools())
        self._session = Session(
            client, hello, welcome, outbox=outbox, player=self.player, follower=self.follower, watch=watch
        )
        self._client = client
        lease = Lease(
            lease_id="train-000000.0", group_id="train-000000", task=TASK, episodes=(0, 1), purpose="train",
            min_version=0, expires_s=60.0,
        )  # fmt: skip
        self._tree = make_tree(lease, 0, digest=DIGEST)
        self.corpus = to_actor(self._tree.tree_id)
        self.outcomes: Counter[str] = Counter()

    @classmethod
    @contextmanager
    def open(cls, folder: Path) -> Iterator[ActorUnderAttack]:
        with Outbox.open(folder / "outbox", limit_trees=9) as outbox, Shadow.open("fuzz", memory=folder) as shadow:
            yield cls(outbox, shadow)

    async def attack(self, parts: Parts) -> None:
        """Receive a message as the hub's. Raises `StateChanged` where it did what it does not say."""
        message = read_from_hub(memoryview(parts[0]), self._client.refused)
        if message is None:
            self.outcomes["skipped"] += 1
            return
        if not len(self._outbox):
            self._outbox.put(self._tree)
        leases, newest = self.player.leases, self.follower.wanted_version
        try:
            await self._session.take(message, tuple(memoryview(part) for part in parts[1:]))
        except UserError:
            if not (isinstance(message, Refuse) and message.reason in ("wrong_config", "wrong_key")):
                raise
        self.outcomes[_named(message)] += 1
        self._judge(message, leases, newest)

    def _judge(self, message: HubMessage, leases: frozenset[str], newest: int) -> None:
        tree_id = self._tree.tree_id
        named = (isinstance(message, Ack) and message.tree_id == tree_id) or (
            isinstance(message, Refuse) and message.about == tree_id and message.reason in FINAL
        )
        if not len(self._outbox) and not named:
            raise StateChanged(f"{message.kind} took a tree it does not name")
        gone, come = leases - self.player.leases, self.player.leases - leases
        allowed = (
            {message.lease_id} if isinstance(message, Lease | Cancel)
            else {message.about} if isinstance(message, Refuse) else set[str]()
        )  # fmt: skip
        if not gone | come <= allowed or (come and not isinstance(message, Lease)):
            raise StateChanged(f"{message.kind} changed leases it does not name")
        if self.follower.wanted_version != newest and not isinstance(message, WeightsReady):
            raise StateChanged(f"{message.kind} announced weights")
        for lease_id in self.player.leases:  # it meets the next message as it met this one
            self.player.cancel(lease_id)


async def _never(lease: Lease, episode: int) -> EpisodeTree:
    raise NotImplementedError


class FilesUnderAttack:
    """A keyframe and a delta as they are pulled: damaged ones are refused, and what is not refused is right."""

    def __init__(self, folder: Path) -> None:
        random = np.random.default_rng(0)
        self._base = _weights(random.standard_normal(600).astype(np.float32))
        target = _weights(random.standard_normal(600).astype(np.float32))
        self._path = folder / "attacked"
        self._digests = {0: weights_digest(self._base), 1: weights_digest(target)}
        write_keyframe(folder / "keyframe", self._base, version=0)
        write_delta(folder / "delta", self._base, target, base_version=0, version=1)
        self.keyframe, self.delta = (folder / "keyframe").read_bytes(), (folder / "delta").read_bytes()
        self.outcomes: Counter[str] = Counter()

    def attack_keyframe(self, content: bytes) -> None:
        """Read it as a keyframe. Raises `StateChanged` where other weights pass for the announced ones."""
        self._path.write_bytes(content)
        try:
            digest = weights_digest(read_keyframe(self._path))
        except BadWeights:
            self.outcomes["keyframe refused"] += 1
            return
        same = digest == self._digests[0]
        self.outcomes["keyframe unharmed" if same else "keyframe of another digest"] += 1

    def attack_delta(self, content: bytes) -> None:
        """Apply it as a delta. Raises `StateChanged` where it quietly gives other weights than announced."""
        self._path.write_bytes(content)
        try:
            after = apply_delta(self._path, self._base, base_version=0)
        except BadDelta:
            self.outcomes["delta refused"] += 1
            return
        if weights_digest(after) != self._digests[1]:
            raise StateChanged("a damaged delta gave other weights")
        self.outcomes["delta unharmed"] += 1


def _weights(values: NDArray[np.float32]) -> Weights:
    return {
        "embed": Tensor("float32", values[:400].reshape(20, 20)),
        "norm": Tensor("bfloat16", (values[400:].view(np.uint32) >> 16).astype(np.uint16)),
    }
