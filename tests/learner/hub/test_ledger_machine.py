"""Whatever actors, trainers and the hub's own death do in whatever order, nothing is lost or doubled and sums hold."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from matpo.config import Config
from protocols.messages import Ack, Goodbye, Lease, Refuse, StepDone
from protocols.records import EpisodeTree, Status, version_of
from tests.learner.hub.bench import Bench, make_config, make_tree

KEPT_CHECKPOINTS = 2


def config(keep_trained: str) -> Config:
    return make_config(
        run={"steps": 50},
        learner={"groups_per_step": 2, "group_size": 3, "keep_checkpoints": KEPT_CHECKPOINTS},
        hub={"max_attempts": 3, "min_group": 2, "lease_s": 10.0, "keep_trained": keep_trained},
        freshness={"eta": 2, "max_staleness_steps": MAX_STALENESS},
    )


MAX_STALENESS = 2
ACTORS = st.sampled_from(["actor-0", "actor-1"])
BOUND = 3 * 6


class LedgerMachine(RuleBasedStateMachine):
    """Drives a hub and keeps a simple model beside it: which trees were acknowledged, which steps taken with what."""

    keep_trained = "all"

    leases = Bundle("leases")
    sent = Bundle("sent")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="matpo-ledger-"))
        self.at = Bench(self.folder, config(self.keep_trained))
        self.acknowledged: set[str] = set()
        self.trained: dict[int, set[str]] = {}
        """Step → trees, of the weights that survive."""
        self.planned: dict[int, list[str]] = {}
        """Step → trees of its batch, whoever asked first."""
        self.step = 0
        self.checkpoints = [0]
        """Steps that can be resumed at, oldest first."""
        self.settled = 0
        """The oldest checkpoint that the hub was told of."""
        self.late: set[str] = set()
        """First sent when their group had been settled."""
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

    @rule(target=sent, actor=ACTORS, steps=st.integers(1, 3), save=st.booleans())
    def work_in_order(self, actor: str, steps: int, save: bool) -> object:
        """What happens most of the time; without it no random order would ever take many steps."""
        trees = []
        for _ in range(steps):
            for lease in self.at.ask(6, actor):
                trees += [self.upload(lease, place, 1.0, 0) for place in range(len(lease.episodes))]
            self.take_a_step(leave_out=False, report=True)
        if save:
            self.save()
        return multiple(*trees)

    @rule(tree=sent)
    def resend(self, tree: EpisodeTree) -> None:
        self.deliver(tree)

    def deliver(self, tree: EpisodeTree) -> None:
        before = self.at.ledger
        answers = self.at.upload(tree)
        assert Ack(tree_id=tree.tree_id) in answers
        after = self.at.ledger
        if after.late > before.late:
            assert after.trees == before.trees
            assert tree.group_id not in self.at.group_ids()
            self.late |= {tree.tree_id} - self.acknowledged
        else:
            assert after.trees == before.trees + (tree.tree_id not in self.acknowledged)
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
        oldest = self.checkpoints[0] if len(self.checkpoints) == KEPT_CHECKPOINTS else 0
        self.settled = max(self.settled, oldest)
        if self.at.batch(step, settled=oldest) is None:
            return
        trees = self.at.batch_trees(step)
        assert self.planned.setdefault(step, trees) == trees, "a batch changed after it was given out"
        if not report:
            return  # killed in the middle of the step
        filtered = trees[:1] if leave_out else []
        trained = [tree for tree in trees if tree not in filtered]
        left_out = tuple((tree, "test") for tree in filtered)
        done = StepDone(lineage=self.lineage, step=step, trained=tuple(trained), filtered=left_out)
        assert not isinstance(self.at.send("trainer", "trainer", done)[0], Refuse)
        self.at.publish(version_of(lineage=self.lineage, step=step))
        self.trained[step] = set(trained)
        self.step = step

    @rule()
    def save(self) -> None:
        earlier = [step for step in self.checkpoints if step < self.step]
        self.checkpoints = [*earlier, self.step][-KEPT_CHECKPOINTS:]

    @precondition(lambda self: self.step > 0)
    @rule(damaged=st.integers(0, 1))
    def resume_from_a_checkpoint(self, damaged: int) -> None:
        """From the newest, or from the one before if it is damaged."""
        checkpoint = self.checkpoints[max(0, len(self.checkpoints) - 1 - damaged)]
        self.lineage = self.at.trainer_hello(checkpoint)
        self.at.publish(version_of(lineage=self.lineage, step=checkpoint))
        self.rolled_back = self.rolled_back or self.step > checkpoint
        self.step = checkpoint
        self.checkpoints = [step for step in self.checkpoints if step <= checkpoint]
        self.trained = {step: trees for step, trees in self.trained.items() if step <= self.step}

    @invariant()
    def sums_hold(self) -> None:
        self.at.check()

    @invariant()
    def nothing_acknowledged_is_lost(self) -> None:
        held, archived = self.at.states().keys(), self.at.archived_states().keys()
        gone = self.acknowledged - held
        assert held <= self.acknowledged
        assert len(gone) == self.at.ledger.settled
        assert archived == (gone if self.keep_trained == "archive" else set())
        assert not gone or self.keep_trained != "all"

    @invariant()
    def the_ledger_says_what_the_trainer_did(self) -> None:
        ledger = self.at.trained_by_step()
        expected = {step: trees for step, trees in self.trained.items() if trees}
        assert {step: trees for step, trees in ledger.items() if step > self.settled} == {
            step: trees for step, trees in expected.items() if step > self.settled
        }
        assert all(trees <= expected[step] for step, trees in ledger.items())
        assert self.at.ledger.trained == sum(map(len, expected.values()))

    @invariant()
    def admission_stays_within_its_bound(self) -> None:
        if not self.rolled_back:
            assert self.at.hub.leases.in_flight() <= BOUND

    @invariant()
    def trained_trees_are_fresh_enough(self) -> None:
        worst = self.at.journal.number("SELECT MAX(staleness) FROM trees WHERE state = 'trained'")
        assert worst <= MAX_STALENESS or self.rolled_back


class ArchivingMachine(LedgerMachine):
    """What every kept checkpoint contains moves to the archive."""

    keep_trained = "archive"


class DroppingMachine(LedgerMachine):
    """What every kept checkpoint contains goes."""

    keep_trained = "drop"


EFFORT = settings(max_examples=15, stateful_step_count=40, deadline=None)
LedgerMachine.TestCase.settings = EFFORT
ArchivingMachine.TestCase.settings = EFFORT
DroppingMachine.TestCase.settings = EFFORT
test_no_order_of_events_loses_or_doubles_a_tree = LedgerMachine.TestCase
test_no_order_of_events_loses_or_doubles_a_tree_that_moves_to_the_archive = ArchivingMachine.TestCase
test_no_order_of_events_loses_or_doubles_a_tree_that_is_dropped = DroppingMachine.TestCase
