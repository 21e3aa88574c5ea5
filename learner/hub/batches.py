"""Which groups a step trains on. A batch is written down before it is sent: who resumes gets it again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import orjson

from learner.hub.figures import Consumed, sum_up
from learner.hub.journal import Journal, Row, integer, maybe_integer, text
from learner.hub.leases import GROUP_TOO_SMALL, Leases
from learner.hub.settled import read_settled
from matpo.freshness import distance
from protocols.messages import StepDone
from protocols.records import version_of

STALE = "stale"


@dataclass(frozen=True, slots=True)
class BatchRules:
    """What may go into a batch."""

    groups_per_step: int
    min_group: int
    max_staleness_steps: int


class OutOfStep(Exception):
    """The trainer asked for a step the ledger does not expect; the message says which it does."""


class Batches:
    """Steps, batches and lineages in the journal. Every method belongs inside a transaction of the caller."""

    def __init__(self, journal: Journal, leases: Leases, rules: BatchRules) -> None:
        self._journal = journal
        self._leases = leases
        self._rules = rules

    @property
    def step(self) -> int:
        """The last step trained, relative to the surviving weights."""
        taken = self._journal.number("SELECT MAX(step) FROM steps WHERE undone = 0")
        return max(taken, self._journal.number("SELECT step FROM lineages ORDER BY lineage DESC LIMIT 1"))

    @property
    def lineage(self) -> int | None:
        """The lineage in force; None before the first trainer came."""
        row = self._journal.row("SELECT MAX(lineage) FROM lineages")
        return None if row is None else maybe_integer(row[0])

    def require_lineage(self, lineage: int) -> int:
        """What a killed trainer had said may be read after its successor's hello. Raises `OutOfStep` for that."""
        current = self.lineage
        if lineage != current:
            raise OutOfStep(f"a trainer of lineage {lineage} is told that lineage {current} has taken its place")
        return lineage

    def begin_lineage(self, step: int, *, at: float) -> int:
        """A trainer starts at `step`: what was trained after it is pending again. Returns its lineage.

        Asking twice is harmless: a lineage that has neither published nor trained is given again. Raises `OutOfStep`
        for a step the ledger has not reached.
        """
        last, lineage = self.step, self.lineage
        if step > last:
            raise OutOfStep(
                f"the trainer is at step {step} but the ledger ends at {last}; resume from an earlier checkpoint"
            )
        settled = read_settled(self._journal).upto_step
        if step < settled:
            raise OutOfStep(
                f"the trainer is at step {step} but what was trained up to step {settled} has left the journal"
                f" (hub.keep_trained); put a sound checkpoint of step {settled} or later back, or start a new run"
            )
        if lineage is not None and self._is_unused(lineage, step):
            return lineage
        fresh = 0 if lineage is None else lineage + 1
        self._journal.execute("INSERT INTO lineages VALUES (?, ?, ?)", (fresh, step, at))
        self._undo_after(step)
        return fresh

    def plan(self, step: int) -> list[int] | None:
        """The groups of step `step`, as planned before or chosen now; None while too few are complete.

        Raises `OutOfStep` for any step but the next.
        """
        lineage = self.lineage
        if lineage is None or step != self.step + 1:
            raise OutOfStep(f"a batch was asked for step {step} but the next step is {self.step + 1}")
        row = self._journal.row("SELECT groups FROM batches WHERE step = ?", (step,))
        if row is not None:
            return [int(seq) for seq in orjson.loads(text(row[0]))]
        chosen = list(self._freshest_first(step, current=version_of(lineage=lineage, step=step - 1)))
        if len(chosen) < self._rules.groups_per_step:
            return None
        self._journal.execute("INSERT INTO batches VALUES (?, ?)", (step, orjson.dumps(chosen).decode()))
        return chosen

    def frames(self, groups: Sequence[int]) -> list[list[memoryview]]:
        """Frames of the pending trees of `groups`, in their order, episodes ascending."""
        found: list[list[memoryview]] = []
        for group in groups:
            rows = self._journal.rows(
                "SELECT sizes, data FROM trees JOIN frames ON tree_seq = seq"
                " WHERE group_seq = ? AND state = 'pending' ORDER BY episode, tree_id",
                (group,),
            )
            found += [split_frames(row) for row in rows]
        return found

    def done(self, message: StepDone, *, at: float) -> None:
        """Mark the trees of a step as trained or filtered. A second report of the same step changes nothing.

        Raises `OutOfStep` if the step is not the next, its trees are not those of its batch, or a trainer says so that
        another has taken the place of.
        """
        lineage = self.require_lineage(message.lineage)
        if self._is_done(lineage, message.step):
            return
        row = self._journal.row("SELECT groups FROM batches WHERE step = ?", (message.step,))
        if message.step != self.step + 1 or row is None:
            raise OutOfStep(f"step {message.step} was reported but the next step is {self.step + 1}")
        groups = [int(seq) for seq in orjson.loads(text(row[0]))]
        reasons: dict[str, str | None] = {**dict.fromkeys(message.trained), **dict(message.filtered)}
        trees = self._pending(groups)
        if reasons.keys() != trees.keys() or len(reasons) != len(message.trained) + len(message.filtered):
            raise OutOfStep(
                f"step {message.step} was reported with {len(reasons)} trees, not the {len(trees)} of its batch"
            )
        current = version_of(lineage=lineage, step=message.step - 1)
        ages = {
            tree: None if oldest is None else distance(version=oldest, current=current)
            for tree, oldest in trees.items()
        }
        figures = sum_up(self._consumed(groups, ages))
        for tree_id, staleness in ages.items():
            reason = reasons[tree_id]
            self._journal.execute(
                "UPDATE trees SET state = ?, reason = ?, step = ?, staleness = ? WHERE tree_id = ?",
                ("trained" if reason is None else "filtered", reason, message.step, staleness, tree_id),
            )
        for group in groups:
            self._leases.finish_group(group, "trained", reason=None, step=message.step)
        counts = (len(message.trained), len(message.filtered))
        self._journal.execute(
            "INSERT INTO steps VALUES (?, ?, ?, ?, 0, ?, ?)",
            (lineage, message.step, *counts, figures.model_dump_json(), at),
        )

    def complete_groups(self) -> int:
        """Groups that are ready to be trained on."""
        return self._journal.number("SELECT COUNT(*) FROM groups WHERE purpose = 'train' AND state = 'complete'")

    def _freshest_first(self, step: int, *, current: int) -> Iterator[int]:
        """The oldest complete groups, stale trees filtered on the way, up to a full batch."""
        rows = self._journal.rows("SELECT seq FROM groups WHERE purpose = 'train' AND state = 'complete' ORDER BY seq")
        found = 0
        for (seq,) in rows:
            if found == self._rules.groups_per_step:
                return
            if self._drop_stale(integer(seq), step, current=current):
                found += 1
                yield integer(seq)

    def _drop_stale(self, group: int, step: int, *, current: int) -> bool:
        """Filter a group's stale trees; False when too few are left and the group is filtered as a whole."""
        trees = self._pending([group])
        stale = [
            tree_id
            for tree_id, oldest in trees.items()
            if oldest is not None and distance(version=oldest, current=current) > self._rules.max_staleness_steps
        ]
        for tree_id in stale:
            self._journal.execute(
                "UPDATE trees SET state = 'filtered', reason = ?, step = ? WHERE tree_id = ?", (STALE, step, tree_id)
            )
        if len(trees) - len(stale) >= self._rules.min_group:
            return True
        self._leases.finish_group(group, "filtered", reason=STALE if stale else GROUP_TOO_SMALL, step=step)
        return False

    def _pending(self, groups: Sequence[int]) -> dict[str, int | None]:
        """Pending trees of these groups and the oldest version in each."""
        return {
            text(tree_id): maybe_integer(oldest)
            for group in groups
            for tree_id, oldest in self._journal.rows(
                "SELECT tree_id, oldest_version FROM trees WHERE group_seq = ? AND state = 'pending'", (group,)
            )
        }

    def _consumed(self, groups: Sequence[int], ages: Mapping[str, int | None]) -> Iterator[Consumed]:
        """The pending trees of these groups, with the staleness they are trained at."""
        for group in groups:
            query = "SELECT tree_id, rewards FROM trees WHERE group_seq = ? AND state = 'pending'"
            for tree_id, rewards in self._journal.rows(query, (group,)):
                yield Consumed(group, orjson.loads(text(rewards)), ages[text(tree_id)])

    def _undo_after(self, step: int) -> None:
        """Return every tree and group that a step after `step` trained or filtered; planned batches stay planned."""
        self._journal.execute("UPDATE steps SET undone = 1 WHERE step > ?", (step,))
        self._journal.execute(
            "UPDATE trees SET state = 'pending', step = NULL, reason = NULL, staleness = NULL WHERE step > ?"
            # What a planned batch left out as stale stays out, so that the batch is the same the second time.
            " AND NOT (reason IS ? AND group_seq IN (SELECT value FROM batches, json_each(batches.groups)))",
            (step, STALE),
        )
        self._journal.execute(
            "UPDATE groups SET state = 'complete', step = NULL, reason = NULL WHERE step > ?", (step,)
        )

    def _is_done(self, lineage: int, step: int) -> bool:
        query = "SELECT 1 FROM steps WHERE lineage = ? AND step = ? AND undone = 0"
        return self._journal.row(query, (lineage, step)) is not None

    def _is_unused(self, lineage: int, step: int) -> bool:
        began = self._journal.number("SELECT step FROM lineages WHERE lineage = ?", (lineage,))
        trained = self._journal.number("SELECT COUNT(*) FROM steps WHERE lineage = ?", (lineage,))
        first = version_of(lineage=lineage, step=0)
        published = self._journal.number("SELECT COUNT(*) FROM publications WHERE version >= ?", (first,))
        return began == step and trained == 0 and published == 0


def split_frames(row: Row) -> list[memoryview]:
    """The frames of a tree from its row (sizes, data)."""
    sizes, data = row
    assert isinstance(data, bytes), "frames are stored as one blob"
    whole, start, frames = memoryview(data), 0, []
    for size in orjson.loads(text(sizes)):
        frames.append(whole[start : start + size])
        start += size
    return frames
