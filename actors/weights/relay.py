"""`matpo-relay`: hands weights on to the actors behind it, so that what leaves the learner does not grow with them.

It pulls each chunk once, from a hub or from another relay, and keeps the last used ones in memory. It checks nothing:
actors check every byte, and leave a relay that errs for the hub.
"""

from __future__ import annotations

import argparse
import re
import socket
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio
import structlog

from actors.failure import user_error
from actors.greet import greet
from actors.weights.download import CHUNK_PATIENCE_S
from matpo.errors import UserError, run_command
from matpo.logs import configure_logs
from protocols.channel import CannotListen, ChannelError, HubClient, HubSocket, Received
from protocols.chunks import ChunkCache, Place
from protocols.keys import ActorKeys, BadKeys, HubKeys
from protocols.limits import PEERS
from protocols.messages import PROTOCOL, Chunk, ChunkRequest, Drain, PullHello, Refuse, Welcome

log: structlog.stdlib.BoundLogger = structlog.get_logger()

UPSTREAM_CHUNKS: Final = 16
"""Most chunks asked for at once: credits of a relay, twice an actor's."""
PULLER_CHUNKS: Final = 2 * UPSTREAM_CHUNKS
"""Most chunks one puller may wait for here: more would be a queue that others stand behind."""
HUB_PATIENCE_S: Final = 20.0


@dataclass(slots=True)
class Wanted:
    """A chunk somebody asked for that is not here yet."""

    request: ChunkRequest
    peers: set[bytes]


class Relay:
    """Between those who pull (`down`) and who has the weights (`up`)."""

    def __init__(
        self, up: HubClient, down: HubSocket, *, hello: PullHello, run: str, memory_bytes: int,
        patience_s: float = CHUNK_PATIENCE_S,
    ) -> None:  # fmt: skip
        """`run` is that of the hub; `patience_s` as in `Download`."""
        self.pulled_bytes = 0
        self.served_bytes = 0
        self._up = up
        self._down = down
        self._run = run
        self._hello = hello.model_copy(update={"run": run})
        self._patience_s = patience_s
        self._cache = ChunkCache(memory_bytes)
        self._pullers: OrderedDict[bytes, None] = OrderedDict()
        """Those heard of last: a link of an actor lives as long as one object takes, and its end is not told."""
        self._wanted: dict[Place, Wanted] = {}
        self._waits: Counter[bytes] = Counter()
        """For how many of those each puller waits."""
        self._queue: deque[Place] = deque()
        self._asked: set[Place] = set()
        self._moved_s = time.monotonic()

    async def run(self) -> None:
        """Serve until the hub sends everybody home. Raises `UserError` when another run's hub answers there now."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._serve, name="serve pullers")
            tasks.start_soon(self._remind, name="remind the hub")
            await self._take_chunks()
            tasks.cancel_scope.cancel()

    async def _serve(self) -> None:
        while True:
            received = await self._down.receive()
            message = received.message
            if isinstance(message, PullHello):
                refusal = message.refusal(self._run)
                if refusal is None:
                    self._pullers[received.peer] = None
                    if len(self._pullers) > PEERS:
                        self._pullers.popitem(last=False)
                await self._down.send(received.peer, refusal or Welcome(run=self._run, heartbeat_s=0.0))
            elif received.peer not in self._pullers:
                await self._down.send(received.peer, Refuse(reason="unknown_peer", detail="say pull_hello first"))
            elif isinstance(message, ChunkRequest):
                self._pullers.move_to_end(received.peer)
                await self._asked_for(received, message)
            else:
                detail = f"{message.kind} belongs to the hub; this is a relay"
                await self._down.send(received.peer, Refuse(reason="unexpected", detail=detail))

    async def _asked_for(self, received: Received, request: ChunkRequest) -> None:
        place = (request.name, request.offset)
        content = self._cache.get(place)
        if content is not None and len(content) <= request.size_bytes:
            await self._hand(received.peer, place, content)
            return
        wanted = self._wanted.get(place)
        if wanted is not None and wanted.request.size_bytes != request.size_bytes:
            detail = f"another asked for {wanted.request.size_bytes} bytes at {request.offset}; ask for as many"
            await self._down.send(received.peer, Refuse(reason="malformed", detail=detail, about=request.name))
        elif wanted is not None and received.peer in wanted.peers:
            return  # asked again, because it takes long
        elif self._waits[received.peer] >= PULLER_CHUNKS:
            detail = f"you wait for {PULLER_CHUNKS} chunks already; ask again when some have come"
            await self._down.send(received.peer, Refuse(reason="too_fast", detail=detail, about=request.name))
        else:
            self._waits[received.peer] += 1
            if wanted is not None:
                wanted.peers.add(received.peer)
                return
            self._wanted[place] = Wanted(request, {received.peer})
            self._queue.append(place)
            await self._ask()

    async def _ask(self) -> None:
        """Keep up to `UPSTREAM_CHUNKS` requests under way; what cannot be sent now is asked for when reminded."""
        while self._queue and len(self._asked) < UPSTREAM_CHUNKS:
            place = self._queue.popleft()
            if place in self._wanted:
                self._asked.add(place)
                self._moved_s = time.monotonic()
                await self._up.send(self._wanted[place].request)

    async def _take_chunks(self) -> None:
        while True:
            message, frames = await self._up.receive()
            match message:
                case Chunk() if len(frames) == 1:
                    await self._take((message.name, message.offset), frames[0])
                case Welcome():
                    await self._ask_again()
                case Refuse(reason="unknown_peer"):  # the hub was restarted
                    await self._up.send(self._hello)
                case Refuse(reason="too_fast"):
                    pass  # asked for again when reminded
                case Refuse(reason="unknown_object" | "malformed", about=name):
                    await self._gone(name, message)
                case Refuse(detail=detail):
                    raise UserError(f"the hub refused this relay: {detail}")
                case Drain():
                    for peer in self._pullers:
                        await self._down.send(peer, message)
                    log.info("sent home", reason=message.reason)
                    return
                case _:
                    log.warning("message not meant for a relay", kind=message.kind)

    async def _take(self, place: Place, content: memoryview) -> None:
        wanted = self._wanted.get(place)
        if wanted is None or content.nbytes > wanted.request.size_bytes:
            return  # it came twice, or is not what was asked for
        self._forget(place)
        self._moved_s = time.monotonic()
        self.pulled_bytes += content.nbytes
        self._cache.put(place, content)
        for peer in wanted.peers:
            await self._hand(peer, place, content)
        await self._ask()

    async def _hand(self, peer: bytes, place: Place, content: bytes | memoryview) -> None:
        if await self._down.send(peer, Chunk(name=place[0], offset=place[1]), [content]):
            self.served_bytes += len(content)
        else:
            self._pullers.pop(peer, None)

    async def _gone(self, name: str, refusal: Refuse) -> None:
        """The hub has the object no longer: so hear all who wait for it."""
        places = [place for place in self._wanted if place[0] == name]
        for peer in {peer for place in places for peer in self._wanted[place].peers}:
            await self._down.send(peer, refusal)
        for place in places:
            self._forget(place)
        await self._ask()

    def _forget(self, place: Place) -> None:
        """Nobody waits for this chunk any more."""
        self._waits -= Counter(self._wanted.pop(place).peers)
        self._asked.discard(place)

    async def _remind(self) -> None:
        """Ask again for what does not come: whoever was asked may have been restarted."""
        while True:
            await anyio.sleep(self._patience_s)
            if self._asked and time.monotonic() - self._moved_s >= self._patience_s:
                await self._ask_again()

    async def _ask_again(self) -> None:
        self._queue.extendleft(self._asked)
        self._asked.clear()
        await self._ask()


@dataclass(frozen=True, slots=True)
class Post:
    """Where a relay stands."""

    hub: str
    listen: str
    key_dir: Path | None
    relay_id: str
    memory_bytes: int


async def run_relay(post: Post, *, patience_s: float = HUB_PATIENCE_S) -> None:
    """Relay until the run ends. Raises what a user can fix."""
    up_keys = None if post.key_dir is None else ActorKeys.load(post.key_dir)
    down_keys = None if post.key_dir is None else HubKeys.of_relay(post.key_dir)
    hello = PullHello(protocol=PROTOCOL, puller_id=post.relay_id, run=None)
    up_link = HubClient.connect(post.hub, keys=up_keys, deadline_s=patience_s)
    async with HubSocket.bind(post.listen, keys=down_keys) as down, up_link as up:
        welcome = await greet(up, hello, deadline_s=patience_s)
        relay = Relay(up, down, hello=hello, run=welcome.run, memory_bytes=post.memory_bytes)
        log.info("relaying", hub=post.hub, listen=down.endpoint, run=welcome.run)
        await relay.run()
        log.info("leaving", pulled_bytes=relay.pulled_bytes, served_bytes=relay.served_bytes)


def parse(arguments: Sequence[str] | None = None) -> Post:
    """The command line."""
    parser = argparse.ArgumentParser(prog="matpo-relay", description=__doc__)
    parser.add_argument("--hub", required=True, help="tcp://HOST:PORT of the hub, or of another relay")
    parser.add_argument("--listen", required=True, help="tcp://HOST:PORT for actors (actor.weights.relay)")
    parser.add_argument(
        "--key-dir", type=Path, help="its own actor.key and the list of those it lets in (docs/security.md)"
    )
    parser.add_argument("--relay-id", default=f"relay-{socket.gethostname()}", help="unique among the run's relays")
    parser.add_argument("--memory-mb", type=int, default=1024, help="chunks kept for those who come later (1024)")
    given = parser.parse_args(arguments)
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given.relay_id):
        raise UserError(
            f"--relay-id {given.relay_id!r} may hold letters, digits, dots, dashes and underscores, up to 64"
        )
    if given.memory_mb < 1:
        raise UserError(f"--memory-mb {given.memory_mb} must be at least 1")
    return Post(given.hub, given.listen, given.key_dir, given.relay_id, given.memory_mb * 2**20)


def run(arguments: Sequence[str] | None = None) -> int:
    """Parse, relay, and turn what a user can fix into one line."""
    post = parse(arguments)
    configure_logs(None, component=post.relay_id)
    try:
        anyio.run(run_relay, post, backend_options={"use_uvloop": True})
    except CannotListen as error:
        reason = str(error).partition(";")[0]
        raise UserError(f"{reason}; give --listen a free address of this machine") from error
    except (ChannelError, BadKeys, BaseExceptionGroup) as error:
        known = user_error(error)
        if known is None:
            raise
        raise known from error
    return 0


def main() -> None:
    """Console script `matpo-relay`."""
    raise SystemExit(run_command(run))


if __name__ == "__main__":
    main()
