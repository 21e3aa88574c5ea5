"""The actor's conversation with the hub: hello, heartbeats, asking for work, and who gets which answer."""

from __future__ import annotations

import anyio
import structlog

from actors.outbox import Outbox
from actors.play import Player
from actors.watch import Watch
from actors.weights.follow import Follower
from matpo.errors import UserError
from protocols.channel import HubClient
from protocols.messages import (
    Ack,
    Cancel,
    Chunk,
    Drain,
    Goodbye,
    Heartbeat,
    Hello,
    HubMessage,
    Lease,
    LeaseRequest,
    Refuse,
    WeightsReady,
    Welcome,
)

log: structlog.stdlib.BoundLogger = structlog.get_logger()

LEAVE_PATIENCE_S = 8.0


class Session:
    """Everything after the welcome."""

    def __init__(
        self,
        client: HubClient,
        hello: Hello,
        welcome: Welcome,
        *,
        outbox: Outbox,
        player: Player,
        follower: Follower,
        watch: Watch,
    ) -> None:
        self._client = client
        self._hello = hello
        self._heartbeat_s = welcome.heartbeat_s
        self._outbox = outbox
        self._player = player
        self._follower = follower
        self._watch = watch
        self.leaving = False
        self._parted = False
        """Goodbye is said: nothing may follow it."""
        self.ended = anyio.Event()
        """Set when the actor may go: the hub sent it home, or it has left."""

    async def listen(self) -> None:
        """Hand every message of the hub to whom it concerns, forever."""
        while True:
            message, frames = await self._client.receive()
            await self.take(message, frames)

    async def take(self, message: HubMessage, frames: tuple[memoryview, ...]) -> None:
        """Hand one message to whom it concerns. Raises `UserError` where the hub will not have this actor."""
        self._player.renew()
        self._watch.hear()
        match message:
            case Lease():
                self._player.take(message)
            case Ack(tree_id=tree_id):
                self._outbox.acknowledge(tree_id)
                self._player.notice()
            case WeightsReady():
                self._follower.announce(message)
            case Chunk() if len(frames) == 1:
                self._follower.take(message, frames[0])
            case Cancel(lease_id=lease_id):
                self._player.cancel(lease_id)
            case Refuse():
                await self._refused(message)
            case Welcome(heartbeat_s=heartbeat_s):
                self._heartbeat_s = heartbeat_s
                self._outbox.resend_all()
                await self._ask()
            case Drain(reason=reason):
                log.info("sent home", reason=reason)
                self.ended.set()
            case _:
                log.warning("message not meant for an actor", kind=message.kind)

    async def _refused(self, refusal: Refuse) -> None:
        if self._outbox.refuse(refusal) or self._follower.refuse(refusal):
            self._player.notice()
        elif refusal.reason == "unknown_peer":  # the hub was restarted
            await self._client.send(self._hello)
        elif refusal.reason == "unknown_lease":
            self._player.cancel(refusal.about)
        elif refusal.reason in ("wrong_config", "wrong_key"):
            raise UserError(f"the hub refused this actor: {refusal.detail}")
        else:
            log.warning("refused", reason=refusal.reason, detail=refusal.detail, about=refusal.about)

    async def beat(self) -> None:
        """Send a heartbeat, and ask for work again, every so many seconds."""
        while True:
            await self._client.wait_connected()
            health, waits = await self._watch.look()
            message = Heartbeat(
                leases=tuple(sorted(self._player.leases | self._outbox.leases)),
                version=self._watch.version,
                live_episodes=self._player.live,
                outbox_trees=len(self._outbox),
                sampled_tokens=health.sampled_tokens,
                prompt_tokens=health.prompt_tokens,
                cached_tokens=health.cached_tokens,
                waits=waits,
            )
            if self._parted:
                return
            await self._client.send(message)
            await self._ask()
            await anyio.sleep(self._heartbeat_s)

    async def ask(self) -> None:
        """Ask for work as soon as there is room for more, forever."""
        asked = 0
        while True:
            if self._player.wanted > asked:
                await self._ask()
            asked = self._player.wanted
            await self._player.wait_changed()

    async def leave(self, reason: str) -> None:
        """Finish the episodes under way and hand over their trees, as far as that takes no longer than
        `LEAVE_PATIENCE_S` each, and give the remaining leases back."""
        log.info("leaving", reason=reason, live_episodes=self._player.live)
        self.leaving = True
        with anyio.move_on_after(LEAVE_PATIENCE_S):
            await self._player.drain()
        with anyio.move_on_after(LEAVE_PATIENCE_S if self._client.connected else 0):
            await self._outbox.wait_empty()
        self._parted = True
        await self._client.send(Goodbye(reason=reason))
        self.ended.set()

    async def _ask(self) -> None:
        if self._player.wanted and not self._parted:
            await self._client.send(LeaseRequest(episodes=self._player.wanted))
