"""Keeps the journal small: what every kept checkpoint contains moves to the archive, or goes, and is only counted.

A trainer resumes from one of its checkpoints at the earliest, so groups finished up to the oldest of them can never
become pending again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pydantic import Field

from learner.hub.journal import Journal, Value, integer, text
from protocols.codec import TreeHeader
from protocols.records import Record

GROUPS_AT_ONCE: Final = 8
"""Settled in one transaction, so that no message waits long."""
_KEY: Final = "settled"
_DUE: Final = """
    SELECT groups.seq FROM groups LEFT JOIN rounds ON rounds.name = groups.round
    WHERE (groups.state IN ('trained', 'filtered') AND COALESCE(groups.step, 0) <= ?1
        OR groups.state = 'evaluated' AND rounds.label = 'during' AND rounds.figures IS NOT NULL AND rounds.step <= ?1)
      AND NOT EXISTS (SELECT 1 FROM leases WHERE leases.group_seq = groups.seq AND leases.state = 'live')
    ORDER BY groups.seq LIMIT ?2
"""
_OF_GROUPS: Final = {
    "groups": "seq IN (SELECT value FROM json_each(?))",
    "leases": "group_seq IN (SELECT value FROM json_each(?))",
    "trees": "group_seq IN (SELECT value FROM json_each(?))",
    "episodes": "group_seq IN (SELECT value FROM json_each(?))",
    "frames": "tree_seq IN (SELECT seq FROM trees WHERE group_seq IN (SELECT value FROM json_each(?)))",
}
"""Tables that hold a group, those that others refer to first, and which of their rows are its."""


class Settled(Record):
    """What is no longer in the journal, in numbers."""

    upto_step: int = 0
    """No trainer can start before this step any more."""
    trees: dict[str, int] = Field(default={})
    """By state."""
    filtered_by: dict[str, int] = Field(default={})
    placed: int = 0
    """Trained trees that had the place of an episode, counted through the episodes."""
    frames: int = 0
    """Trees counted through their frames."""
    tasks: dict[str, int] = Field(default={})
    """Training groups by state."""
    episodes: dict[str, int] = Field(default={})
    """Of training, by state."""
    evaluation_episodes: int = 0

    def __add__(self, other: Settled) -> Settled:
        return Settled(
            upto_step=max(self.upto_step, other.upto_step),
            trees=_sum(self.trees, other.trees),
            filtered_by=_sum(self.filtered_by, other.filtered_by),
            placed=self.placed + other.placed,
            frames=self.frames + other.frames,
            tasks=_sum(self.tasks, other.tasks),
            episodes=_sum(self.episodes, other.episodes),
            evaluation_episodes=self.evaluation_episodes + other.evaluation_episodes,
        )


def read_settled(journal: Journal) -> Settled:
    """What this journal has settled so far."""
    row = journal.row("SELECT value FROM meta WHERE key = ?", (_KEY,))
    return Settled() if row is None else Settled.model_validate_json(text(row[0]))


class Settler:
    """Settles groups a few at a time, inside the caller's transaction."""

    def __init__(self, journal: Journal, *, archive: Path | None) -> None:
        """`archive` is a second journal file that takes what is settled; None drops it."""
        self._journal = journal
        self._archive = archive
        self._upto_step = 0
        self._done_step = 0

    def allow(self, step: int) -> None:
        """Every checkpoint that the trainer keeps is of `step` or later."""
        self._upto_step = max(self._upto_step, step)

    def settle_some(self, *, most: int = GROUPS_AT_ONCE) -> int:
        """Settle up to `most` groups; returns how many there were."""
        if self._done_step == self._upto_step:
            return 0
        due = self._journal.rows(_DUE, (self._upto_step, most))
        groups = [integer(seq) for (seq,) in due]
        if groups:
            self._move(_OF_GROUPS, str(groups))
            self._count(Settled(upto_step=self._upto_step) + self._tally(str(groups)))
            for table, rows in reversed(_OF_GROUPS.items()):
                self._journal.execute(f"DELETE FROM {table} WHERE {rows}", (str(groups),))
        if len(groups) < most:
            self._move({"batches": "step <= ?"}, self._upto_step)
            self._journal.execute("DELETE FROM batches WHERE step <= ?", (self._upto_step,))
            self._done_step = self._upto_step
        return len(groups)

    def _tally(self, groups: str) -> Settled:
        """Count what the rows of these groups say."""
        trees, filtered, tasks, episodes = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
        query = f"SELECT state, reason, COUNT(*) FROM trees WHERE {_OF_GROUPS['trees']} GROUP BY state, reason"
        for state, reason, count in self._journal.rows(query, (groups,)):
            trees[text(state)] += integer(count)
            if state == "filtered":
                filtered[text(reason)] += integer(count)
        query = f"SELECT state, COUNT(*) FROM groups WHERE {_OF_GROUPS['groups']} AND purpose = 'train' GROUP BY state"
        tasks.update({text(state): integer(count) for state, count in self._journal.rows(query, (groups,))})
        query = (
            "SELECT episodes.state, purpose, COUNT(*) FROM episodes JOIN groups ON seq = group_seq"
            f" WHERE {_OF_GROUPS['episodes']} GROUP BY episodes.state, purpose"
        )
        evaluation = 0
        for state, purpose, count in self._journal.rows(query, (groups,)):
            if purpose == "train":
                episodes[text(state)] += integer(count)
            else:
                evaluation += integer(count)
        placed = (
            "SELECT COUNT(*) FROM episodes JOIN trees USING (tree_id)"
            f" WHERE trees.{_OF_GROUPS['trees']} AND trees.state = 'trained'"
        )
        return Settled(
            trees=trees,
            filtered_by=filtered,
            placed=self._journal.number(placed, (groups,)),
            frames=self._journal.number(f"SELECT COUNT(*) FROM frames WHERE {_OF_GROUPS['frames']}", (groups,)),
            tasks=tasks,
            episodes=episodes,
            evaluation_episodes=evaluation,
        )

    def _count(self, more: Settled) -> None:
        total = read_settled(self._journal) + more
        self._journal.execute(
            "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            (_KEY, total.model_dump_json()),
        )

    def _move(self, tables: Mapping[str, str], of: Value) -> None:
        """Copy rows to the archive. On disk there before they go here; a second copy of a row replaces the first."""
        if self._archive is None:
            return
        with Journal.open(self._archive) as archive, archive.transaction():
            for table, rows in tables.items():
                for row in self._journal.rows(f"SELECT * FROM {table} WHERE {rows}", (of,)):
                    archive.execute(f"INSERT OR REPLACE INTO {table} VALUES ({', '.join('?' * len(row))})", row)


def is_settled(journal: Journal, header: TreeHeader) -> bool:
    """Whether a tree is of a group that this journal handed out and has settled since."""
    name, _, number = header.group_id.rpartition("-")
    if not number.isdecimal() or not 1 <= int(number) <= opened_groups(journal):  # int() does not take every digit: ²
        return False
    if name != "train" and journal.row("SELECT 1 FROM rounds WHERE name = ?", (name,)) is None:
        return False
    return journal.row("SELECT 1 FROM groups WHERE seq = ?", (int(number),)) is None


def opened_groups(journal: Journal) -> int:
    """Groups opened so far, which is the number of the newest."""
    return journal.counter("train_groups") + journal.counter("eval_groups")


def _sum(one: Mapping[str, int], two: Mapping[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + two.get(name, 0) for name in sorted({*one, *two})}
