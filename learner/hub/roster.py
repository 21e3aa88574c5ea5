"""The actors the hub knows at this moment. Nothing here outlives the hub: actors say hello to a new one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from protocols.messages import Heartbeat, Hello, Wait

GONE_S: Final = 3600.0
"""An actor this long silent was taken away with its machine; one that comes after all says hello again."""


@dataclass(slots=True)
class KnownActor:
    """One actor as its last messages described it."""

    peer: bytes
    actor_id: str
    capacity: int
    heard_s: float
    """Monotonic time of its last message."""
    unconfirmed: set[str] = field(default_factory=set)
    """Leases from before its hello; what its first heartbeat does not name is lost to it."""
    wanted: int = 0
    """Episodes it could start now."""
    version: int = -1
    live_episodes: int = 0
    outbox_trees: int = 0
    sampled_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    waits: tuple[Wait, ...] = ()


class Roster:
    """Actors by peer; an actor that comes back under its name replaces its former self."""

    def __init__(self, *, silence_limit_s: float) -> None:
        self._actors: dict[bytes, KnownActor] = {}
        self._silence_limit_s = silence_limit_s
        self.pullers: set[bytes] = set()
        """Those who only pull weights (relays): they play nothing, so nobody waits for them."""

    def hello(self, peer: bytes, hello: Hello, leases: set[str], now_s: float) -> None:
        """An actor introduced itself; the journal says it holds `leases`."""
        former = self.named(hello.actor_id)
        if former is not None:
            del self._actors[former.peer]
        self._actors[peer] = KnownActor(peer, hello.actor_id, hello.capacity, now_s, unconfirmed=leases)

    def heartbeat(self, actor: KnownActor, message: Heartbeat) -> set[str]:
        """Note what an actor says of itself; returns the leases it turns out to have lost."""
        lost = actor.unconfirmed - set(message.leases)
        actor.unconfirmed = set()
        actor.sampled_tokens = message.sampled_tokens
        actor.prompt_tokens, actor.cached_tokens = message.prompt_tokens, message.cached_tokens
        actor.version = message.version
        actor.live_episodes = message.live_episodes
        actor.outbox_trees = message.outbox_trees
        actor.waits = message.waits
        return lost

    def forget(self, peer: bytes) -> None:
        """An actor left."""
        self._actors.pop(peer, None)

    def forget_gone(self, now_s: float) -> None:
        """Wait no longer for actors that will not come back."""
        self._actors = {peer: actor for peer, actor in self._actors.items() if now_s - actor.heard_s <= GONE_S}

    def at(self, peer: bytes) -> KnownActor | None:
        return self._actors.get(peer)

    def named(self, actor_id: str) -> KnownActor | None:
        return next((actor for actor in self._actors.values() if actor.actor_id == actor_id), None)

    def everyone(self) -> list[KnownActor]:
        """All actors that have not said goodbye, by name."""
        return sorted(self._actors.values(), key=lambda actor: actor.actor_id)

    @property
    def prefix_hit_rate(self) -> float | None:
        """Share of the actors' prompt tokens, since they started, that their engines did not compute again."""
        prompted = sum(actor.prompt_tokens for actor in self._actors.values())
        cached = sum(actor.cached_tokens for actor in self._actors.values())
        return round(cached / prompted, 4) if prompted else None

    def live(self, now_s: float) -> list[KnownActor]:
        """Those heard of lately."""
        return [actor for actor in self.everyone() if now_s - actor.heard_s <= self._silence_limit_s]

    def silent(self, now_s: float) -> list[KnownActor]:
        """Those not heard of lately."""
        return [actor for actor in self.everyone() if now_s - actor.heard_s > self._silence_limit_s]
