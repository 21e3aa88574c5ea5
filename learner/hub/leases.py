"""Who plays what: groups opened, episodes leased, expired leases handed out again, late trees accepted up to G.

The decisions are pure functions; `Leases` looks up what they need in the journal and writes down what they say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import orjson

from learner.hub.journal import Journal, Value, integer, maybe_integer, text
from learner.hub.settled import opened_groups
from protocols.codec import Frame, TreeHeader
from protocols.messages import Purpose
from protocols.records import INFRASTRUCTURE, Task

EpisodeState = Literal["waiting", "leased", "filled", "abandoned"]
GroupState = Literal["open", "complete", "trained", "filtered", "evaluated"]
LeaseEnd = Literal["played", "expired", "returned", "cancelled"]

SURPLUS = "surplus"
GROUP_TOO_SMALL = "group_too_small"
ZERO_VARIANCE = "zero_variance"


@dataclass(frozen=True, slots=True)
class GroupRules:
    """When a group is complete and worth training on."""

    group_size: int
    min_group: int
    max_attempts: int
    filter_zero_variance: bool


@dataclass(frozen=True, slots=True)
class Grant:
    """Episodes of one group handed to one actor."""

    lease_id: str
    group_id: str
    task: Task
    episodes: tuple[int, ...]
    purpose: Purpose
    round_step: int
    """Evaluation: the step whose weights are asked for."""


@dataclass(frozen=True, slots=True)
class CancelledLease:
    """A lease with nothing left to play, and whose it was."""

    lease_id: str
    actor_id: str


def after_failure(*, attempts: int, max_attempts: int) -> EpisodeState:
    """What becomes of an episode whose lease ended without a usable tree."""
    return "abandoned" if attempts >= max_attempts else "waiting"


def group_state(states: Sequence[str], rewards: Sequence[float], rules: GroupRules) -> tuple[GroupState, str | None]:
    """State of a training group and, if it is filtered, why. `rewards` are those of its scored trees."""
    if any(state in ("waiting", "leased") for state in states):
        return "open", None
    if len(rewards) < rules.min_group:
        return "filtered", GROUP_TOO_SMALL
    if rules.filter_zero_variance and max(rewards) - min(rewards) < 1e-9:
        return "filtered", ZERO_VARIANCE
    return "complete", None


def failure_reason(header: TreeHeader) -> str | None:
    """Why a tree cannot be trained on: how its first broken trajectory ended, or `unscored`; None for a scored tree."""
    if header.reward is not None:
        return None
    return next((status for status in header.statuses if status in INFRASTRUCTURE), "unscored")


class Leases:
    """The life of groups and leases in the journal. Every method belongs inside a transaction of the caller."""

    def __init__(self, journal: Journal, rules: GroupRules, *, lease_s: float, now_s: float) -> None:
        """Leases that were live when an earlier hub died get a full term from `now_s` (monotonic seconds)."""
        self._journal = journal
        self._rules = rules
        self._lease_s = lease_s
        live = journal.rows("SELECT lease_id FROM leases WHERE state = 'live'")
        self._deadlines = {text(lease_id): now_s + lease_s for (lease_id,) in live}

    def open_group(self, task: Task, *, purpose: Purpose, round_name: str | None, episodes: int, at: float) -> int:
        """Start a group of `episodes` episodes of `task` (at Unix time `at`); returns its number."""
        seq = opened_groups(self._journal) + 1
        group_id = f"{round_name or 'train'}-{seq:06d}"
        self._journal.insert(
            "INSERT INTO groups (seq, group_id, purpose, round, task_id, task, state, opened_at)"
            " VALUES (?, ?, ?, ?, ?, ?, 'open', ?)",
            (seq, group_id, purpose, round_name, task.task_id, task.model_dump_json(), at),
        )
        for episode in range(episodes):
            self._journal.execute(
                "INSERT INTO episodes (group_seq, episode, state) VALUES (?, ?, 'waiting')", (seq, episode)
            )
        self._journal.count_up(f"{purpose}_groups")
        self._journal.count_up(f"{purpose}_episodes", episodes)
        return seq

    def in_flight(self) -> int:
        """Training episodes admitted and not yet trained, filtered or given up."""
        return self._journal.number(
            "SELECT (SELECT COUNT(*) FROM trees WHERE state = 'pending')"
            " + (SELECT COUNT(*) FROM episodes JOIN groups ON seq = group_seq"
            "    WHERE episodes.state = 'waiting' AND purpose = 'train')"
            " + (SELECT COUNT(*) FROM leases JOIN episodes USING (lease_id) JOIN groups ON seq = episodes.group_seq"
            "    WHERE leases.state = 'live' AND purpose = 'train')"
        )

    def train_groups(self) -> int:
        """Training groups opened so far: the position of the task cursor."""
        return self._journal.counter("train_groups")

    def leased_to(self, actor_id: str) -> int:
        """Episodes the actor holds."""
        return self._journal.number(
            "SELECT COUNT(*) FROM leases JOIN episodes USING (lease_id) WHERE leases.state = 'live' AND actor_id = ?",
            (actor_id,),
        )

    def live(self, actor_id: str) -> set[str]:
        """The actor's leases."""
        rows = self._journal.rows("SELECT lease_id FROM leases WHERE state = 'live' AND actor_id = ?", (actor_id,))
        return {text(lease_id) for (lease_id,) in rows}

    def waiting_groups(self, purpose: Purpose, *, upto_step: int) -> dict[int, int]:
        """Groups with episodes nobody plays and how many, oldest first; evaluation only once its step is reached."""
        rows = self._journal.rows(
            "SELECT group_seq, COUNT(*) FROM episodes JOIN groups ON groups.seq = group_seq"
            " LEFT JOIN rounds ON rounds.name = groups.round"
            " WHERE episodes.state = 'waiting' AND purpose = ? AND COALESCE(rounds.step, 0) <= ?"
            " GROUP BY group_seq ORDER BY group_seq",
            (purpose, upto_step),
        )
        return {integer(seq): integer(count) for seq, count in rows}

    def grant(self, group_seq: int, actor_id: str, *, most: int, now_s: float, at: float) -> Grant:
        """Lease up to `most` of a group's waiting episodes to an actor."""
        row = self._journal.row(
            "SELECT group_id, task, purpose, COALESCE(rounds.step, 0) FROM groups"
            " LEFT JOIN rounds ON rounds.name = round WHERE seq = ?",
            (group_seq,),
        )
        assert row is not None, f"group {group_seq} does not exist"
        group_id, purpose = text(row[0]), text(row[2])
        waiting = self._journal.rows(
            "SELECT episode FROM episodes WHERE group_seq = ? AND state = 'waiting' ORDER BY episode LIMIT ?",
            (group_seq, most),
        )
        number = self._journal.number("SELECT COUNT(*) FROM leases WHERE group_seq = ?", (group_seq,))
        lease_id = f"{group_id}.{number}"
        self._journal.execute(
            "INSERT INTO leases VALUES (?, ?, ?, 'live', ?)",
            (lease_id, group_seq, actor_id, at),
        )
        self._deadlines[lease_id] = now_s + self._lease_s
        for (episode,) in waiting:
            self._journal.execute(
                "UPDATE episodes SET state = 'leased', lease_id = ?, attempts = attempts + 1"
                " WHERE group_seq = ? AND episode = ?",
                (lease_id, group_seq, episode),
            )
        return Grant(
            lease_id=lease_id,
            group_id=group_id,
            task=Task.model_validate_json(text(row[1])),
            episodes=tuple(integer(episode) for (episode,) in waiting),
            purpose="train" if purpose == "train" else "eval",
            round_step=integer(row[3]),
        )

    def renew(self, lease_ids: Sequence[str], actor_id: str, *, now_s: float) -> None:
        """A heartbeat of their actor names these leases."""
        for lease_id in self.live(actor_id).intersection(lease_ids):
            self._deadlines[lease_id] = now_s + self._lease_s

    def overdue(self, now_s: float) -> list[str]:
        """Leases nobody renewed in time."""
        return [lease_id for lease_id, deadline in self._deadlines.items() if deadline <= now_s]

    def end(self, lease_id: str, how: LeaseEnd) -> int:
        """Close a lease; its unplayed episodes wait for another (or are given up). Returns how many there were.

        A lease given back by an actor that leaves does not count as an attempt.
        """
        self._deadlines.pop(lease_id, None)
        self._journal.execute("UPDATE leases SET state = ? WHERE lease_id = ? AND state = 'live'", (how, lease_id))
        left = self._journal.rows("SELECT group_seq, episode, attempts FROM episodes WHERE lease_id = ?", (lease_id,))
        for group_seq, episode, attempts in left:
            tried = integer(attempts) - (how == "returned")
            state = after_failure(attempts=tried, max_attempts=self._rules.max_attempts)
            self._set_episode(integer(group_seq), integer(episode), state, attempts=tried)
        for group_seq in {integer(row[0]) for row in left}:
            self._settle(group_seq)
        return len(left)

    def knows(self, header: TreeHeader, actor_id: str) -> bool:
        """Whether this journal handed out the lease a tree names, for that task and episode, and to that actor."""
        found = self._journal.row(
            "SELECT 1 FROM leases JOIN groups ON groups.seq = leases.group_seq"
            " JOIN episodes ON episodes.group_seq = groups.seq AND episode = ?"
            " WHERE leases.lease_id = ? AND leases.actor_id = ? AND group_id = ? AND task_id = ?",
            (header.episode, header.lease_id, actor_id, header.group_id, header.task.task_id),
        )
        return found is not None

    def holds(self, tree_id: str) -> bool:
        """Whether a tree is in the journal."""
        return self._journal.row("SELECT 1 FROM trees WHERE tree_id = ?", (tree_id,)) is not None

    def arrive(self, header: TreeHeader, frames: Sequence[Frame], *, at: float) -> CancelledLease | None:
        """Write down a tree that is known not to be in the journal yet.

        Returns the lease that has nothing left to play because this tree, late from an earlier lease, took its place.
        """
        group_seq, purpose, group = self._group(header.group_id)
        state, attempts, holder = self._episode(group_seq, header.episode)
        failure = failure_reason(header)
        wanted = group == "open" and state != "filled"
        if not wanted:
            self._insert(header, frames, group_seq, "filtered" if purpose == "train" else "evaluation", SURPLUS, at)
            return None
        if failure is None:
            self._insert(header, frames, group_seq, "pending" if purpose == "train" else "evaluation", None, at)
            self._set_episode(group_seq, header.episode, "filled", attempts=attempts, tree_id=header.tree_id)
        else:
            self._insert(header, frames, group_seq, "filtered" if purpose == "train" else "evaluation", failure, at)
            if holder == header.lease_id:  # else another lease plays it again already
                retry = after_failure(attempts=attempts, max_attempts=self._rules.max_attempts)
                self._set_episode(group_seq, header.episode, retry, attempts=attempts)
        ended = self._end_if_played(holder) if holder is not None else None
        self._settle(group_seq)
        return ended if ended is not None and ended.lease_id != header.lease_id else None

    def finish_group(self, group_seq: int, state: GroupState, *, reason: str | None, step: int | None) -> None:
        """Close a group; when it is filtered, so are its pending trees."""
        self._journal.execute(
            "UPDATE groups SET state = ?, reason = ?, step = ? WHERE seq = ?", (state, reason, step, group_seq)
        )
        if state == "filtered":
            self._journal.execute(
                "UPDATE trees SET state = 'filtered', reason = ?, step = ? WHERE group_seq = ? AND state = 'pending'",
                (reason, step, group_seq),
            )

    def _settle(self, group_seq: int) -> None:
        """Close a group when its last episode is in or given up."""
        row = self._journal.row("SELECT purpose, state FROM groups WHERE seq = ?", (group_seq,))
        assert row is not None, f"group {group_seq} does not exist"
        if row[1] != "open":
            return
        states = [
            text(s) for (s,) in self._journal.rows("SELECT state FROM episodes WHERE group_seq = ?", (group_seq,))
        ]
        rewards = list(self.pending_rewards(group_seq))
        state, reason = group_state(states, rewards, self._rules)
        if state == "open":
            return
        if row[0] == "eval":
            state, reason = "evaluated", None
        self.finish_group(group_seq, state, reason=reason, step=None)

    def pending_rewards(self, group_seq: int) -> Iterator[float]:
        """Rewards of a group's pending trees."""
        query = "SELECT reward FROM trees WHERE group_seq = ? AND state = 'pending'"
        for (reward,) in self._journal.rows(query, (group_seq,)):
            assert isinstance(reward, float), "a pending tree is scored"
            yield reward

    def _end_if_played(self, lease_id: str) -> CancelledLease | None:
        if self._journal.number("SELECT COUNT(*) FROM episodes WHERE lease_id = ?", (lease_id,)):
            return None
        row = self._journal.row("SELECT actor_id FROM leases WHERE lease_id = ? AND state = 'live'", (lease_id,))
        if row is None:
            return None
        self.end(lease_id, "played")
        return CancelledLease(lease_id, text(row[0]))

    def _group(self, group_id: str) -> tuple[int, str, str]:
        row = self._journal.row("SELECT seq, purpose, state FROM groups WHERE group_id = ?", (group_id,))
        assert row is not None, f"group {group_id} does not exist"
        return integer(row[0]), text(row[1]), text(row[2])

    def _episode(self, group_seq: int, episode: int) -> tuple[str, int, str | None]:
        row = self._journal.row(
            "SELECT state, attempts, lease_id FROM episodes WHERE group_seq = ? AND episode = ?", (group_seq, episode)
        )
        assert row is not None, f"group {group_seq} has no episode {episode}"
        return text(row[0]), integer(row[1]), None if row[2] is None else text(row[2])

    def _set_episode(
        self, group_seq: int, episode: int, state: EpisodeState, *, attempts: int, tree_id: str | None = None
    ) -> None:
        self._journal.execute(
            "UPDATE episodes SET state = ?, attempts = ?, lease_id = NULL, tree_id = ?"
            " WHERE group_seq = ? AND episode = ?",
            (state, attempts, tree_id, group_seq, episode),
        )

    def _insert(
        self, header: TreeHeader, frames: Sequence[Frame], group_seq: int, state: str, reason: str | None, at: float
    ) -> None:
        values: dict[str, Value] = {
            "tree_id": header.tree_id,
            "group_seq": group_seq,
            "lease_id": header.lease_id,
            "episode": header.episode,
            "actor_id": header.actor_id,
            "state": state,
            "reason": reason,
            "oldest_version": maybe_integer(header.oldest_version),
            "newest_version": maybe_integer(header.newest_version),
            "reward": header.reward,
            "rewards": orjson.dumps(header.rewards).decode(),
            "tokens": header.token_count,
            "sampled_tokens": header.sampled_count,
            "tool_calls": header.tool_calls,
            "tool_failures": header.tool_failures,
            "seconds": header.seconds,
            "received_at": at,
        }
        columns, marks = ", ".join(values), ", ".join("?" * len(values))
        seq = self._journal.insert(f"INSERT INTO trees ({columns}) VALUES ({marks})", tuple(values.values()))
        sizes = orjson.dumps([memoryview(frame).nbytes for frame in frames]).decode()
        self._journal.insert("INSERT INTO frames VALUES (?, ?, ?)", (seq, sizes, b"".join(frames)))
        self._journal.count_up("trees")
        self._journal.count_up("tokens", header.token_count)
        self._journal.count_up("sampled_tokens", header.sampled_count)
