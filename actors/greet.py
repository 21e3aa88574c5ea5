"""The first words to a hub or a relay."""

from __future__ import annotations

import anyio

from matpo.errors import UserError
from protocols.channel import HubClient
from protocols.messages import Hello, PullHello, Refuse, Welcome

HELLO_EVERY_S = 2.0


class SentHome(UserError):
    """The run is ending: nobody is let in any more."""


async def greet(client: HubClient, hello: Hello | PullHello, *, deadline_s: float) -> Welcome:
    """Say hello until welcomed. Raises `SentHome` when the run is ending, another `UserError` when the hub refuses, or
    says nothing for `deadline_s` seconds."""
    with anyio.move_on_after(deadline_s):
        while True:
            await client.send(hello)
            with anyio.move_on_after(HELLO_EVERY_S):
                while True:
                    message, _ = await client.receive()
                    match message:
                        case Welcome():
                            return message
                        case Refuse(reason="draining", detail=detail):
                            raise SentHome(f"the hub lets nobody in: {detail}")
                        case Refuse(reason="wrong_config" | "wrong_protocol" | "wrong_key", detail=detail):
                            who = "actor" if isinstance(hello, Hello) else "relay"
                            raise UserError(f"the hub refused this {who}: {detail}")
                        case _:  # meant for an earlier actor of this name
                            continue
    raise UserError(f"the hub is there but did not answer hello within {deadline_s:g} s; see its log")
