"""A hub on the bench: the real core over a real journal, a clock that tests turn, messages instead of sockets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from learner.hub.core import Hub, Outgoing, Side
from learner.hub.evaluation import EvaluationRecord
from learner.hub.journal import Journal, integer
from learner.hub.ledger import Ledger, checks, read_ledger
from matpo.config import Config
from protocols.channel import HubInput, Received
from protocols.codec import encode_tree
from protocols.messages import (
    PROTOCOL,
    Batch,
    BatchRequest,
    Heartbeat,
    Hello,
    HubMessage,
    Lease,
    LeaseRequest,
    Ok,
    Publish,
    StepDone,
    TrainerHello,
    TrainerWelcome,
    TreeUpload,
    WeightObject,
)
from protocols.records import EpisodeTree, Status, Task, Trajectory, Turn, WeightStamp, version_of

TOKENIZER = "tokenizer-1"
SECTIONS: dict[str, dict[str, object]] = {
    "run": {"steps": 4},
    "learner": {"groups_per_step": 2, "group_size": 2},
    "hub": {"lease_s": 10.0, "heartbeat_s": 1.0, "max_attempts": 2},
    "freshness": {"eta": 1, "max_staleness_steps": 4},
    "evaluation": {"questions": 0},
}


def make_config(**changes: dict[str, object]) -> Config:
    """A small configuration: 2 groups of 2 trees a step, 4 steps, eta 1, no evaluation; `learner={...}` changes it."""
    sections = {name: SECTIONS.get(name, {}) | changes.get(name, {}) for name in {**SECTIONS, **changes}}
    return Config.model_validate(
        {
            "model": {"path": "models/none"},
            "data": {"train": {"kind": "world"}, "evaluation": {"kind": "world"}},
            "episode": {"roles": {"planner": {"system": "plan"}}},
            **sections,
        }
    )


def make_tasks(count: int, name: str = "q") -> list[Task]:
    """Distinct questions of 1, 2, 1, 2 … hops."""
    return [Task.make(f"{name}{n}", ("a",), {"hops": 1 + n % 2, "template": f"t{n % 3}"}) for n in range(count)]


def digest_of(version: int) -> str:
    return f"weights-{version}"


def make_tree(
    lease: Lease,
    episode: int,
    *,
    version: int = 0,
    reward: float | None = 1.0,
    status: Status = "done",
    tree_id: str | None = None,
    reading: float | None = None,
) -> EpisodeTree:
    """A tree of one trajectory, two prompt tokens and three sampled ones."""
    trajectory = Trajectory(
        role="planner",
        parent=None,
        tokens=np.array([1, 2, 3, 4, 5], dtype=np.int32),
        sampled=np.array([False, False, True, True, True]),
        logprobs=np.full(3, -0.5, dtype=np.float32),
        versions=np.full(3, version, dtype=np.int32),
        turns=(Turn(kind="prompt", start=0, stop=2), Turn(kind="sampled", start=2, stop=5, stop_reason="stop")),
        status=status,
    )
    return EpisodeTree(
        tree_id=tree_id or f"{lease.lease_id}/{episode}",
        group_id=lease.group_id,
        lease_id=lease.lease_id,
        episode=episode,
        actor_id="actor-0",
        task=lease.task,
        trajectories=(trajectory,),
        rewards={"total": reward, "answer": reward, "format": None if reward is None else 1.0, "reading": reading},
        weights=(WeightStamp(version=version, digest=digest_of(version)),),
        tool_spans=(),
        started_at=100.0,
        seconds=2.0,
    )


class Bench:
    """Drives a hub message by message. Every call is one transaction, as in the service."""

    def __init__(self, folder: Path, config: Config | None = None, *, train: int = 50, evaluation: int = 10) -> None:
        self.folder = folder
        self.config = config or make_config()
        self.archive = folder / "archive.sqlite"
        self.train = make_tasks(train)
        self.evaluation = make_tasks(evaluation, "held-out-")
        self.now_s = 1000.0
        self.rounds: list[EvaluationRecord] = []
        self._open()

    def _open(self) -> None:
        self._manager = Journal.open(self.folder / "journal.sqlite")
        self.journal = self._manager.__enter__()
        self.hub = Hub(
            self.config,
            self.journal,
            run="bench",
            weights=self.folder / "weights",
            archive=self.archive,
            tokenizer=TOKENIZER,
            train=self.train,
            evaluation=self.evaluation,
            now_s=self.now_s,
        )

    def close(self) -> None:
        self._manager.__exit__(None, None, None)

    def restart(self) -> None:
        """kill -9 between two transactions, and a new hub."""
        self.close()
        self._open()

    def send(self, side: Side, peer: str, message: HubInput, frames: Sequence[bytes] = ()) -> list[HubMessage]:
        """Hand in a message; returns everything the hub sends to that peer in return."""
        out = self.step([(side, Received(peer.encode(), message, tuple(memoryview(f) for f in frames)))])
        return [o.message for o in out if o.peer == peer.encode()]

    def step(self, arrivals: Sequence[tuple[Side, Received]] = (), *, seconds: float = 0.0) -> list[Outgoing]:
        """Let time pass, hand in messages, and return all that is sent."""
        self.now_s += seconds
        with self.journal.transaction():
            for side, received in arrivals:
                self.hub.handle(side, received, now_s=self.now_s, at=self.now_s)
            self.rounds += self.hub.advance(now_s=self.now_s, at=self.now_s)
        return self.hub.take_outgoing()

    def hello(self, actor: str = "actor-0", capacity: int = 100) -> list[HubMessage]:
        return self.send("actors", actor, self.hello_message(actor, capacity))

    def hello_message(self, actor: str = "actor-0", capacity: int = 100) -> Hello:
        return self.hello_of(self.config, actor, capacity)

    @staticmethod
    def hello_of(config: Config, actor: str, capacity: int = 100) -> Hello:
        """What an actor with these settings says first."""
        digest = config.shared_digest
        return Hello(
            protocol=PROTOCOL, actor_id=actor, tokenizer_digest=TOKENIZER, config_digest=digest, capacity=capacity
        )

    def ask(self, episodes: int, actor: str = "actor-0") -> list[Lease]:
        answers = self.send("actors", actor, LeaseRequest(episodes=episodes))
        return [message for message in answers if isinstance(message, Lease)]

    def beat(self, *leases: str, actor: str = "actor-0") -> list[HubMessage]:
        message = Heartbeat(leases=leases, version=0, live_episodes=0, outbox_trees=0, sampled_tokens=0)
        return self.send("actors", actor, message)

    def upload(self, tree: EpisodeTree, actor: str | None = None) -> list[HubMessage]:
        """By the actor that was given the lease, or by another."""
        frames = encode_tree(tree)
        return self.send("actors", actor or self._holder(tree), TreeUpload(tree_id=tree.tree_id), frames)

    def upload_frames(self, tree_id: str, frames: Sequence[bytes]) -> list[HubMessage]:
        """Upload what may not be a tree."""
        return self.send("actors", "actor-0", TreeUpload(tree_id=tree_id), frames)

    def arrival(self, tree: EpisodeTree) -> tuple[Side, Received]:
        """The upload of a tree, not handed in yet."""
        frames = tuple(memoryview(frame) for frame in encode_tree(tree))
        return "actors", Received(self._holder(tree).encode(), TreeUpload(tree_id=tree.tree_id), frames)

    def _holder(self, tree: EpisodeTree) -> str:
        row = self.journal.row("SELECT actor_id FROM leases WHERE lease_id = ?", (tree.lease_id,))
        return "actor-0" if row is None else str(row[0])

    def arrival_of(self, message: HubInput, actor: str = "actor-0") -> tuple[Side, Received]:
        """An actor's message without frames, not handed in yet."""
        return "actors", Received(actor.encode(), message, ())

    def batch_request(self, step: int) -> tuple[Side, Received]:
        """A trainer's request, not handed in yet."""
        return "trainer", Received(b"trainer", BatchRequest(step=step), ())

    def lease_request(self, episodes: int, actor: str = "actor-0") -> tuple[Side, Received]:
        """A request for work, not handed in yet."""
        return "actors", Received(actor.encode(), LeaseRequest(episodes=episodes), ())

    def play(self, lease: Lease, *, version: int = 0, rewards: Sequence[float] = (1.0, 0.0)) -> None:
        """Upload a tree for every episode of a lease."""
        for episode in lease.episodes:
            self.upload(make_tree(lease, episode, version=version, reward=rewards[episode % len(rewards)]))

    def start(self, *, step: int = 0, actor: str = "actor-0") -> int:
        """A trainer says hello and publishes its weights, an actor says hello; returns the lineage."""
        lineage = self.trainer_hello(step)
        self.publish(version_of(lineage=lineage, step=step))
        self.hello(actor)
        return lineage

    def trainer_hello_message(self, step: int = 0) -> TrainerHello:
        return TrainerHello(protocol=PROTOCOL, step=step, config_digest=self.config.shared_digest)

    def trainer_hello(self, step: int = 0) -> int:
        (answer,) = self.send("trainer", "trainer", self.trainer_hello_message(step))
        assert isinstance(answer, TrainerWelcome), answer
        return answer.lineage

    def publish(self, version: int, content: bytes = b"weights") -> HubMessage:
        name = f"keyframe-{version}.bin"
        (self.folder / "weights" / name).write_bytes(content)
        entry = WeightObject(
            name=name, kind="keyframe", version=version, base=None, size_bytes=len(content), digest="x"
        )
        answers = self.send("trainer", "trainer", Publish(version=version, digest=digest_of(version), objects=(entry,)))
        return answers[0]

    def batch(self, step: int, *, settled: int = 0) -> Batch | None:
        """Ask for a batch; None if there is none yet."""
        answers = self.send("trainer", "trainer", BatchRequest(step=step, settled=settled))
        found = [answer for answer in answers if isinstance(answer, Batch)]
        return found[0] if found else None

    def batch_trees(self, step: int) -> list[str]:
        """Ids of the trees that the batch of `step` consists of."""
        rows = self.journal.rows(
            "SELECT tree_id FROM trees WHERE state = 'pending' AND group_seq IN"
            " (SELECT value FROM batches, json_each(batches.groups) WHERE batches.step = ?) ORDER BY tree_id",
            (step,),
        )
        return [str(tree_id) for (tree_id,) in rows]

    def train_step(
        self, step: int, *, lineage: int = 0, filtered: Sequence[tuple[str, str]] = (), settled: int = 0
    ) -> list[str]:
        """Take a whole step: batch, report, publish. Returns the trees trained."""
        assert self.batch(step, settled=settled) is not None
        left_out = {tree_id for tree_id, _ in filtered}
        trained = [tree_id for tree_id in self.batch_trees(step) if tree_id not in left_out]
        done = StepDone(lineage=lineage, step=step, trained=tuple(trained), filtered=tuple(filtered))
        assert self.send("trainer", "trainer", done) == [Ok()]
        assert self.publish(version_of(lineage=lineage, step=step)) == Ok()
        return trained

    @property
    def ledger(self) -> Ledger:
        return read_ledger(self.journal)

    def check(self) -> None:
        """Every sum of the ledger holds."""
        assert [check for check in checks(self.journal) if not check.holds] == []

    def states(self) -> dict[str, tuple[str, str | None]]:
        """State and reason of every tree."""
        rows = self.journal.rows("SELECT tree_id, state, reason FROM trees")
        return {str(t): (str(s), None if r is None else str(r)) for t, s, r in rows}

    def archived_states(self) -> dict[str, str]:
        """State of every tree in the archive."""
        if not self.archive.exists():
            return {}
        with Journal.open_read_only(self.archive) as archive:
            return {str(tree_id): str(state) for tree_id, state in archive.rows("SELECT tree_id, state FROM trees")}

    def trained_by_step(self) -> dict[int, set[str]]:
        """Trees that the journal holds as trained, by step."""
        found: dict[int, set[str]] = {}
        for step, tree_id in self.journal.rows("SELECT step, tree_id FROM trees WHERE state = 'trained'"):
            found.setdefault(integer(step), set()).add(str(tree_id))
        return found

    def group_ids(self) -> set[str]:
        return {str(group_id) for (group_id,) in self.journal.rows("SELECT group_id FROM groups")}


@contextmanager
def bench(folder: Path, config: Config | None = None, *, train: int = 50, evaluation: int = 10) -> Iterator[Bench]:
    """A bench whose journal is closed at the end, its ledger checked."""
    made = Bench(folder, config, train=train, evaluation=evaluation)
    try:
        yield made
        made.check()
    finally:
        made.close()
