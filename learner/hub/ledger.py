"""The ledger: what became of every episode, and checks that its sums add up. Reads only; works on any run's journal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from learner.hub.journal import Journal, integer, text
from learner.hub.settled import read_settled
from protocols.records import Record


class Ledger(Record):
    """Counts of trees, training groups and episodes by state."""

    trees: int
    """Acknowledged, over the whole run."""
    pending: int
    trained: int
    filtered: int
    evaluation: int
    filtered_by: dict[str, int]
    tasks: int
    """Training groups opened: one task each."""
    tasks_open: int
    """Being played."""
    tasks_complete: int
    """Waiting for a step."""
    tasks_trained: int
    tasks_filtered: int
    episodes_waiting: int
    """Training episodes that nobody plays now."""
    episodes_leased: int
    episodes_abandoned: int
    """Given up after hub.max_attempts leases."""
    leases_live: int
    settled: int
    """Trees that were moved to the archive or dropped (`hub.keep_trained`); the counts above include them."""
    late: int
    """Arrivals after their task was settled (sent again, or beyond G): acknowledged, not kept, counted only here."""


class Check(Record):
    """One sum that must hold."""

    name: str
    left: int
    right: int

    @property
    def holds(self) -> bool:
        return self.left == self.right


def read_ledger(journal: Journal) -> Ledger:
    """Count everything, in the caller's transaction or snapshot."""
    gone = read_settled(journal)
    trees = _counts(journal, "SELECT state, COUNT(*) FROM trees GROUP BY state", gone.trees)
    reasons = _counts(
        journal, "SELECT reason, COUNT(*) FROM trees WHERE state = 'filtered' GROUP BY reason", gone.filtered_by
    )
    groups = _counts(journal, "SELECT state, COUNT(*) FROM groups WHERE purpose = 'train' GROUP BY state", gone.tasks)
    episodes = _counts(
        journal,
        "SELECT episodes.state, COUNT(*) FROM episodes JOIN groups ON seq = group_seq"
        " WHERE purpose = 'train' GROUP BY episodes.state",
        gone.episodes,
    )
    return Ledger(
        trees=journal.counter("trees"),
        pending=trees.get("pending", 0),
        trained=trees.get("trained", 0),
        filtered=trees.get("filtered", 0),
        evaluation=trees.get("evaluation", 0),
        filtered_by=dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
        tasks=journal.counter("train_groups"),
        tasks_open=groups.get("open", 0),
        tasks_complete=groups.get("complete", 0),
        tasks_trained=groups.get("trained", 0),
        tasks_filtered=groups.get("filtered", 0),
        episodes_waiting=episodes.get("waiting", 0),
        episodes_leased=episodes.get("leased", 0),
        episodes_abandoned=episodes.get("abandoned", 0),
        leases_live=journal.number("SELECT COUNT(*) FROM leases WHERE state = 'live'"),
        settled=sum(gone.trees.values()),
        late=journal.counter("late"),
    )


def checks(journal: Journal) -> list[Check]:
    """Every sum of the ledger, left and right counted by different ways."""
    count, ledger, gone = journal.number, read_ledger(journal), read_settled(journal)
    filled = "SELECT COUNT(*) FROM episodes JOIN groups ON groups.seq = group_seq WHERE episodes.state = 'filled'"
    placed = f"SELECT COUNT(*) FROM ({filled.replace('COUNT(*)', 'tree_id')}) JOIN trees USING (tree_id)"
    return [
        _check(
            "trees acknowledged = pending + trained + filtered + evaluation",
            ledger.trees,
            ledger.pending + ledger.trained + ledger.filtered + ledger.evaluation,
        ),
        _check(
            "trees acknowledged = trees with frames", ledger.trees, gone.frames + count("SELECT COUNT(*) FROM frames")
        ),
        _check(
            "tasks started = open + complete + trained + filtered",
            ledger.tasks,
            ledger.tasks_open + ledger.tasks_complete + ledger.tasks_trained + ledger.tasks_filtered,
        ),
        _check(
            "episodes admitted = waiting + leased + filled + abandoned",
            journal.counter("train_episodes") + journal.counter("eval_episodes"),
            sum(gone.episodes.values()) + gone.evaluation_episodes + count("SELECT COUNT(*) FROM episodes"),
        ),
        _check("filled episodes = trees in their places", count(filled), count(placed)),
        _check(
            "pending and trained trees = trees in the place of an episode",
            ledger.pending + ledger.trained,
            gone.placed
            + count(
                "SELECT COUNT(*) FROM trees JOIN episodes USING (tree_id)"
                " WHERE trees.state IN ('pending', 'trained') AND trees.group_seq = episodes.group_seq"
            ),
        ),
        *_of_steps(journal, ledger),
        _check(
            "leased episodes = leased episodes of live leases",
            count("SELECT COUNT(*) FROM episodes WHERE state = 'leased'"),
            count("SELECT COUNT(*) FROM episodes JOIN leases USING (lease_id) WHERE leases.state = 'live'"),
        ),
        _check(
            "pending trees of finished groups = 0",
            count(
                "SELECT COUNT(*) FROM trees JOIN groups ON groups.seq = group_seq"
                " WHERE trees.state = 'pending' AND groups.state NOT IN ('open', 'complete')"
            ),
            0,
        ),
    ]


def _of_steps(journal: Journal, ledger: Ledger) -> Iterator[Check]:
    """What the trees say of the steps, and the steps of the trees."""
    yield _check(
        "trained trees = trees reported by the steps that stand",
        ledger.trained,
        journal.number("SELECT SUM(trained) FROM steps WHERE undone = 0"),
    )
    yield _check(
        "trained trees of steps beyond the last = 0",
        journal.number(
            "SELECT COUNT(*) FROM trees WHERE state = 'trained' AND step NOT IN"
            " (SELECT step FROM steps WHERE undone = 0)"
        ),
        0,
    )


def _check(name: str, left: int, right: int) -> Check:
    return Check(name=name, left=left, right=right)


def _counts(journal: Journal, query: str, settled: Mapping[str, int]) -> dict[str, int]:
    """How many by state or reason, those that left the journal included."""
    found = {text(name): integer(count) for name, count in journal.rows(query)}
    return {name: found.get(name, 0) + settled.get(name, 0) for name in (*found, *(settled.keys() - found.keys()))}
