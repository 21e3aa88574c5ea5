"""A network link between an actor and its hub: a small TCP proxy that can be cut, or made slow and narrow."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Self

import anyio
from anyio.abc import SocketStream

CHUNK_BYTES = 2**16
GONE = (OSError, anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError)


@dataclass(slots=True)
class Link:
    """Passes bytes on, both ways, to wherever the hub listens at the moment."""

    hub: Callable[[], tuple[str, int] | None]
    """Where the hub listens; None while there is none."""
    endpoint: str = ""
    """For the actor."""
    latency_s: float = 0.0
    """Added to every chunk, each way."""
    bytes_per_s: float = float("inf")
    is_cut: bool = False
    _open: set[SocketStream] = field(default_factory=set)

    @classmethod
    @asynccontextmanager
    async def listening(cls, hub: Callable[[], tuple[str, int] | None]) -> AsyncIterator[Self]:
        """Listen on a free port of this machine."""
        link = cls(hub)
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        link.endpoint = f"tcp://127.0.0.1:{port}"
        async with listener, anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, link._carry)
            yield link
            tasks.cancel_scope.cancel()

    async def cut(self) -> None:
        """Break every connection and let nobody through until `mend`."""
        self.is_cut = True
        for stream in list(self._open):
            await anyio.aclose_forcefully(stream)

    def mend(self) -> None:
        """As good as new."""
        self.is_cut, self.latency_s, self.bytes_per_s = False, 0.0, float("inf")

    async def _carry(self, actor: SocketStream) -> None:
        """One connection of the actor, as long as both ends want it."""
        place = None if self.is_cut else self.hub()
        async with actor:
            if place is None:
                return
            try:
                hub = await anyio.connect_tcp(*place)
            except OSError:  # it died and is not back yet
                return
            async with hub:
                ends = {actor, hub}
                self._open |= ends
                try:
                    async with anyio.create_task_group() as ways:
                        ways.start_soon(self._pass_on, actor, hub, ways.cancel_scope)
                        ways.start_soon(self._pass_on, hub, actor, ways.cancel_scope)
                finally:
                    self._open -= ends

    async def _pass_on(self, source: SocketStream, sink: SocketStream, both: anyio.CancelScope) -> None:
        try:
            while True:
                chunk = await source.receive(CHUNK_BYTES)
                delay_s = self.latency_s + len(chunk) / self.bytes_per_s
                if delay_s:
                    await anyio.sleep(delay_s)
                await sink.send(chunk)
        except GONE:
            both.cancel()
