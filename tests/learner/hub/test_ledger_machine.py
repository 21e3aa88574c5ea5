"""Whatever actors, trainers and the hub's own death do in whatever order, nothing is lost or doubled and sums hold."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from protocols.messages import Ack, Goodbye, Lease, Refuse, StepDone
from protocols.records import EpisodeTree, Status, version_of
from tests.learner.hub.bench import Bench, make_config, make_tree

CONFIG = make_config(
    run={"steps": 50},
    learner={"groups_per_step": 2, "group_size": 3},
    hub={"max_attempts": 3, "min_group": 2, "lease_s": 10.0},
    freshness={"eta": 2, "max_staleness_steps": 2},
)
ACTORS = st.sampled_from(["actor-0", "actor-1"])
BOUND = 3 * 6


class LedgerMachine(RuleBasedStateMachine):
    """Drives a hub and keeps a simple model beside it: which trees were acknowledged, which steps taken with what."""

    leases = Bundle("leases")
    sent = Bundle("sent")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="matpo-ledger-"))
        self.at = Bench(self.folder, CONFIG)
        self.acknowledged: set[str] = set()
        self.trained: dict[int, set[str]] = {}
        """Step → trees, of the weights that survive."""
        self.planned: dict[int, list[str]] = {}
        """Step → trees of its batch, whoever asked first."""
        self.step = 0
        self.checkpoint = 0
        self.rolled_back = False
        self.lineage = self.at.start()
        self.at.hello("actor-1")

    def teardown(self) -> None:
        self.at.close()
        shutil.rmtree(self.folder)

    @rule(target=leases, actor=ACTORS, episodes=st.integers(1, 7))
    def ask(self, actor: str, episodes: int) -> object:
        return multiple(*self.at.ask(episodes, actor))

    @rule(
        target=sent,
        lease=leases,
        place=st.integers(0, 2),
        reward=st.sampled_from([0.0, 1.0, 1.0, None]),
        attempt=st.integers(0, 1),
    )
    def upload(self, lease: Lease, place: int, reward: float | None, attempt: int) -> EpisodeTree:
        episode = lease.episodes[place % len(lease.episodes)]
        version = version_of(lineage=self.lineage, step=self.step)
        tree_id = f"{lease.lease_id}/{episode}/{attempt}"
        status: Status = "done" if reward is not None else "tool_failure"
        tree = make_tree(lease, episode, version=version, reward=reward, status=status, tree_id=tree_id)
        self.deliver(tree)
        return tree

    @rule(tree=sent)
    def resend(self, tree: EpisodeTree) -> None:
        self.deliver(tree)

    def deliver(self, tree: EpisodeTree) -> None:
        before = self.at.ledger.trees
        answers = self.at.upload(tree)
        assert Ack(tree_id=tree.tree_id) in answers
        assert self.at.ledger.trees == before + (tree.tree_id not in self.acknowledged)
        self.acknowledged.add(tree.tree_id)

    @rule(seconds=st.sampled_from([1.0, 4.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.at.step(seconds=seconds)

    @rule(lease=consumes(leases), actor=ACTORS)
    def heartbeat(self, lease: Lease, actor: str) -> None:
        self.at.beat(lease.lease_id, actor=actor)

    @rule(actor=ACTORS)
    def leave_and_come_back(self, actor: str) -> None:
        self.at.send("actors", actor, Goodbye(reason="test"))
        self.at.hello(actor)

    @rule()
    def kill_the_hub(self) -> None:
        self.at.restart()
        for actor in ("actor-0", "actor-1"):
            self.at.hello(actor)

    @rule(leave_out=st.booleans(), report=st.booleans())
    def take_a_step(self, leave_out: bool, report: bool) -> None:
        step = self.step + 1
        if self.at.batch(step) is None:
            return
        trees = self.at.batch_trees(step)
        assert self.planned.setdefault(step, trees) == trees, "a batch changed after it was given out"
        if not report:
            return  # killed in the middle of the step
        filtered = trees[:1] if leave_out else []
        trained = [tree for tree in trees if tree not in filtered]
        done = StepDone(step=step, trained=tuple(trained), filtered=tuple((tree, "test") for tree in filtered))
        assert not isinstance(self.at.send("trainer", "trainer", done)[0], Refuse)
        self.at.publish(version_of(lineage=self.lineage, step=step))
        self.trained[step] = set(trained)
        self.step = step

    @rule()
    def save(self) -> None:
        self.checkpoint = self.step

    @precondition(lambda self: self.step > 0)
    @rule()
    def resume_from_the_checkpoint(self) -> None:
        self.lineage = self.at.trainer_hello(self.checkpoint)
        self.at.publish(version_of(lineage=self.lineage, step=self.checkpoint))
        self.rolled_back = self.rolled_back or self.step > self.checkpoint
        self.step = self.checkpoint
        self.trained = {step: trees for step, trees in self.trained.items() if step <= self.step}

    @invariant()
    def sums_hold(self) -> None:
        self.at.check()

    @invariant()
    def nothing_acknowledged_is_lost(self) -> None:
        assert self.at.states().keys() == self.acknowledged

    @invariant()
    def the_ledger_says_what_the_trainer_did(self) -> None:
        rows = self.at.journal.rows("SELECT step, tree_id FROM trees WHERE state = 'trained'")
        ledger: dict[int, set[str]] = {}
        for step, tree_id in rows:
            assert isinstance(step, int)
            ledger.setdefault(step, set()).add(str(tree_id))
        assert ledger == {step: trees for step, trees in self.trained.items() if trees}

    @invariant()
    def admission_stays_within_its_bound(self) -> None:
        if not self.rolled_back:
            assert self.at.hub.leases.in_flight() <= BOUND

    @invariant()
    def trained_trees_are_fresh_enough(self) -> None:
        worst = self.at.journal.number("SELECT MAX(staleness) FROM trees WHERE state = 'trained'")
        assert worst <= CONFIG.freshness.max_staleness_steps or self.rolled_back


LedgerMachine.TestCase.settings = settings(max_examples=20, stateful_step_count=40, deadline=None)
test_no_order_of_events_loses_or_doubles_a_tree = LedgerMachine.TestCase
