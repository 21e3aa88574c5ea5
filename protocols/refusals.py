"""What a channel will not do, in words: errors a user can fix, and the `Refuse` a peer gets for a bad message."""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Final
from urllib.parse import urlsplit

from pydantic import Field, TypeAdapter, ValidationError

from protocols.keys import ActorKeys, HubKeys
from protocols.messages import ActorMessage, HubMessage, Refuse, TrainerMessage

Frame = bytes | memoryview
HubInput = ActorMessage | TrainerMessage

_HUB_INPUT: TypeAdapter[HubInput] = TypeAdapter(Annotated[ActorMessage | TrainerMessage, Field(discriminator="kind")])
_HUB_OUTPUT: TypeAdapter[HubMessage] = TypeAdapter(Annotated[HubMessage, Field(discriminator="kind")])

MAX_HEADER_BYTES: Final = 4 * 2**20
MAX_FRAMES: Final = 64
"""Most frames a peer may send the hub in one message (a tree has 8)."""


class ChannelError(Exception):
    """Base of what a user can fix about a connection, in one line."""


class KeysNeeded(ChannelError, ValueError):
    """An address beyond this machine was to be used without keys."""


class CannotListen(ChannelError):
    """The hub's address is taken, malformed or not ours."""


class HubUnreachable(ChannelError):
    """Nobody answered at the hub's address in time."""


class WrongKey(ChannelError):
    """Somebody answered, but the keys do not match."""


class HubSilent(ChannelError):
    """The hub did not answer a request in time."""


def is_local(endpoint: str) -> bool:
    """Whether only processes of this machine can be at the other end."""
    parts = urlsplit(endpoint)
    if parts.scheme in ("ipc", "inproc"):
        return True
    host = parts.hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_keys(endpoint: str, keys: HubKeys | ActorKeys | None) -> None:
    """Raise `KeysNeeded` for an address beyond this machine without keys."""
    if keys is None and not is_local(endpoint):
        raise KeysNeeded(
            f"{endpoint} is not on this machine and no keys are set; make them with `matpo keys new DIR`"
            " and set hub.key_dir = DIR"
        )


def read_for_hub(parts: Sequence[memoryview], *, max_message_bytes: int) -> HubInput | Refuse:
    """The message the hub was sent, or the answer to it if it is not one. `parts`: header, then frames."""
    if not parts:
        return Refuse(reason="malformed", detail="a message without a header")
    total, header = sum(part.nbytes for part in parts), parts[0].nbytes
    if total > max_message_bytes:
        return Refuse(reason="oversized", detail=f"{total} bytes; hub.max_message_bytes is {max_message_bytes}")
    if header > MAX_HEADER_BYTES or len(parts) > MAX_FRAMES:
        limits = f"at most {MAX_HEADER_BYTES} and {MAX_FRAMES}"
        return Refuse(reason="oversized", detail=f"a header of {header} bytes and {len(parts)} frames; {limits}")
    try:
        return _HUB_INPUT.validate_json(bytes(parts[0]))
    except ValidationError as error:
        return _explain(error)


def read_from_hub(header: memoryview, refused: Counter[str]) -> HubMessage | None:
    """The hub's message; None, counted, if it makes no sense."""
    try:
        return _HUB_OUTPUT.validate_json(bytes(header))
    except ValidationError as error:
        refused[_explain(error).reason] += 1
        return None


def _explain(error: ValidationError) -> Refuse:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return Refuse(
        reason="unexpected" if first["type"] == "union_tag_invalid" else "malformed",
        detail=f"{where}: {first['msg']}"[:500],
    )
