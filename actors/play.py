"""Leases become episodes, up to the actor's concurrency; finished trees go to the outbox.

A failed episode ends nobody else's. While the hub is away, what is leased is played on until the outbox is full.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

import anyio
import structlog

from matpo.waits import Condition, waiting
from protocols.messages import Lease
from protocols.records import EpisodeTree

log: structlog.stdlib.BoundLogger = structlog.get_logger()

REMEMBERED_LEASES = 4096
EPISODE_ERRORS = (ValueError, LookupError, TypeError, ArithmeticError, OSError, RuntimeError)
"""What a defect in a workflow, a template or a tool's answer may raise. The episode is logged, counted and given up;
its lease is no longer renewed for it, so the hub hands it out again, a bounded number of times."""

PlayEpisode = Callable[[Lease, int], Awaitable[EpisodeTree]]
"""Plays the episode of this index of the lease."""


class Store(Protocol):
    """What playing needs of `actors.outbox.Outbox`."""

    @property
    def full(self) -> bool: ...

    def put(self, tree: EpisodeTree) -> None: ...


@dataclass(slots=True, eq=False)
class _Held:
    """A lease with episodes still to be played or under way."""

    lease: Lease
    taken_at: float
    """Monotonic seconds."""
    queued: deque[int]
    live: dict[int, anyio.CancelScope] = field(default_factory=dict)


class Player:
    """Holds leases and keeps up to `concurrency` episodes live."""

    def __init__(self, play: PlayEpisode, *, version: Callable[[], int], store: Store, concurrency: int) -> None:
        """`version` is that of the weights the engine holds now."""
        self._play = play
        self._version = version
        self._store = store
        self._concurrency = concurrency
        self._held: dict[str, _Held] = {}
        self._waiting: dict[str, _Held] = {}
        """Those with episodes not begun, oldest first."""
        self._known: OrderedDict[str, None] = OrderedDict()
        self._live = self._queued = 0
        self._renewed_at = time.monotonic()
        self._draining = False
        self._changed = anyio.Event()
        self.counts: Counter[str] = Counter()
        """Episodes by end: finished, failed, cancelled, expired."""

    @property
    def live(self) -> int:
        """Episodes under way."""
        return self._live

    @property
    def queued(self) -> int:
        """Leased episodes not begun."""
        return self._queued

    @property
    def wanted(self) -> int:
        """Episodes the actor could begin now beyond those it holds."""
        if self._draining or self._store.full:
            return 0
        return max(0, self._concurrency - self.live - self.queued)

    @property
    def leases(self) -> frozenset[str]:
        """Leases that heartbeats must renew."""
        return frozenset(self._held)

    @property
    def waiting_for(self) -> Condition | None:
        """What keeps episodes from starting; None when nothing does."""
        if self._store.full:
            return waiting("outbox")
        if self.queued and self.live < self._concurrency:
            needed = min(held.lease.min_version for held in self._waiting.values())
            return waiting("weights", version=needed)
        if not self._held:
            return waiting("leases")
        return None

    def take(self, lease: Lease) -> None:
        """Accept a lease; one that was seen before is nothing new."""
        if lease.lease_id in self._known or self._draining:
            return
        self._known[lease.lease_id] = None
        if len(self._known) > REMEMBERED_LEASES:
            self._known.popitem(last=False)
        held = _Held(lease, time.monotonic(), deque(lease.episodes))
        self._held[lease.lease_id] = self._waiting[lease.lease_id] = held
        self._queued += len(held.queued)
        self.notice()

    def renew(self) -> None:
        """The hub answered: it has our heartbeats."""
        self._renewed_at = time.monotonic()

    def cancel(self, lease_id: str) -> None:
        """Stop playing a lease."""
        held = self._held.pop(lease_id, None)
        if held is not None:
            self.counts["cancelled"] += len(held.live) + self._give_up(held)
            for scope in held.live.values():
                scope.cancel()
            self.notice()

    async def drain(self) -> None:
        """Begin nothing more and wait for the episodes under way. Bound it with a deadline of your own."""
        self._draining = True
        self.notice()
        while self.live:
            await self._changed.wait()

    def notice(self) -> None:
        """Something changed that may let an episode begin: weights, room in the outbox, a lease."""
        self._changed.set()
        self._changed = anyio.Event()

    async def wait_changed(self) -> None:
        """Until `notice`."""
        await self._changed.wait()

    async def run(self) -> None:
        """Play forever."""
        async with anyio.create_task_group() as episodes:
            while True:
                following = self._next()
                if following is None:
                    await self._changed.wait()
                    continue
                held, episode = following
                scope = held.live[episode] = anyio.CancelScope()
                self._live += 1
                episodes.start_soon(self._episode, held, episode, scope, name=f"{held.lease.lease_id}/{episode}")

    def _next(self) -> tuple[_Held, int] | None:
        """The oldest leased episode that may begin now. Looks no further: there may be hundreds of leases."""
        if self._draining or self._store.full or self.live >= self._concurrency:
            return None
        version, now = self._version(), time.monotonic()
        expired: list[_Held] = []
        chosen: _Held | None = None
        for held in self._waiting.values():
            if max(held.taken_at, self._renewed_at) + held.lease.expires_s < now:
                expired.append(held)
            elif version >= max(held.lease.min_version, 0):
                chosen = held
                break
        for held in expired:  # the hub has surely handed it on; what is under way is still welcome
            self.counts["expired"] += self._give_up(held)
            self._forget_finished(held)
        if chosen is None:
            return None
        episode = chosen.queued.popleft()
        self._queued -= 1
        if not chosen.queued:
            del self._waiting[chosen.lease.lease_id]
        return chosen, episode

    def _give_up(self, held: _Held) -> int:
        """Begin no more of a lease. Returns how many episodes that leaves unplayed."""
        given_up = len(held.queued)
        held.queued.clear()
        self._queued -= given_up
        self._waiting.pop(held.lease.lease_id, None)
        return given_up

    async def _episode(self, held: _Held, episode: int, scope: anyio.CancelScope) -> None:
        lease = held.lease
        try:
            with scope:
                self._store.put(await self._play(lease, episode))
                self.counts["finished"] += 1
        except* EPISODE_ERRORS as errors:  # grouped too: agents run in task groups
            self.counts["failed"] += 1
            reason = str(errors.exceptions[0]).partition("\n")[0]
            log.exception("episode failed", lease=lease.lease_id, task=lease.task.task_id, reason=reason)
        finally:
            del held.live[episode]
            self._live -= 1
            self._forget_finished(held)
            self.notice()

    def _forget_finished(self, held: _Held) -> None:
        if not held.queued and not held.live:
            self._held.pop(held.lease.lease_id, None)
