"""What a channel will not do, in words: errors a user can fix, and the `Refuse` a peer gets for a bad message."""

from __future__ import annotations

import ipaddress
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final
from urllib.parse import urlsplit

from pydantic import Field, TypeAdapter, ValidationError

from protocols.keys import ActorKeys, HubKeys
from protocols.messages import ActorMessage, HubMessage, Refuse, TrainerMessage, TreeUpload

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

    def __init__(self, endpoint: str) -> None:
        super().__init__(
            f"{endpoint} is not on this machine and no keys are set; make them with `matpo keys new DIR`"
            " and set hub.key_dir=DIR (matpo-relay: --key-dir DIR)"
        )


class CannotListen(ChannelError):
    """The hub's address is taken or not ours."""

    def __init__(self, endpoint: str, reason: str) -> None:
        super().__init__(f"cannot listen on {endpoint}: {reason}; set hub.listen to a free address of this machine")


class HubUnreachable(ChannelError):
    """Nobody answered at the hub's address in time."""

    def __init__(self, endpoint: str, deadline_s: float) -> None:
        super().__init__(
            f"no hub answered at {endpoint} within {deadline_s:g} s; start matpo-learner or correct the address"
        )


class WrongKey(ChannelError):
    """Somebody answered, but the keys do not match."""

    def __init__(self, endpoint: str, keys: ActorKeys | None) -> None:
        super().__init__(
            f"hub at {endpoint} wants keys; make some with `matpo keys new DIR --hub KEY` (the public key that `matpo"
            " keys show` prints there) and set hub.key_dir=DIR"
            if keys is None
            else f"hub at {endpoint} does not accept the key {keys.pair.public}; there, run `matpo keys allow DIR"
            f" '{keys.pair.public}'`, and check that its public key is {keys.hub}"
        )


class HubSilent(ChannelError):
    """The hub did not answer a request in time."""

    def __init__(self, endpoint: str, question: str, deadline_s: float, waiting_for: str) -> None:
        super().__init__(
            f"hub at {endpoint} has not answered {question} for {deadline_s:g} s (waiting for {waiting_for});"
            " see `matpo doctor` and the hub's log"
        )


@dataclass(frozen=True, slots=True)
class Received:
    """One accepted message of an actor or the trainer."""

    peer: bytes
    """Connection to answer to."""
    message: HubInput
    frames: tuple[memoryview, ...]
    key: str | None = None
    """The public key whose owner sent it; None where no keys are used."""


def is_local(endpoint: str) -> bool:
    """Whether only processes of this machine can be at the other end."""
    parts = urlsplit(endpoint)
    if parts.scheme in ("ipc", "inproc") or parts.hostname == "localhost":
        return True
    try:
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False


def check_endpoint(endpoint: str, keys: HubKeys | ActorKeys | None) -> None:
    """Raise `ChannelError` for what is no address, `KeysNeeded` for one beyond this machine without keys."""
    parts = urlsplit(endpoint)
    try:
        usable = parts.scheme == "ipc" or (parts.scheme == "tcp" and parts.hostname and parts.port is not None)
    except ValueError:  # a port that is none
        usable = False
    if not usable:
        raise ChannelError(f"{endpoint!r} is not an address; expected tcp://HOST:PORT or ipc://PATH")
    if keys is None and not is_local(endpoint):
        raise KeysNeeded(endpoint)


def check_listen(endpoint: str, keys: HubKeys | None) -> None:
    """Raise what listening there would raise, before anything is started. Nobody may take the address meanwhile."""
    check_endpoint(endpoint, keys)
    parts = urlsplit(endpoint)
    if parts.scheme != "tcp" or not parts.port:
        return
    host = "" if parts.hostname in (None, "*") else str(parts.hostname)
    try:
        socket.create_server((host, parts.port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except socket.gaierror:
        return  # ZeroMQ also takes the name of an interface
    except OSError as error:
        raise CannotListen(endpoint, str(error.strerror).partition(" (while")[0]) from error


def read_for_hub(parts: Sequence[memoryview], *, max_message_bytes: int) -> HubInput | Refuse:
    """The message the hub was sent, or the answer to it if it is not one. `parts`: header, then frames."""
    if not parts:
        return Refuse(reason="malformed", detail="a message without a header")
    total, header = sum(part.nbytes for part in parts), parts[0].nbytes
    if total > max_message_bytes:
        detail = f"{total} bytes; hub.max_message_bytes is {max_message_bytes}"
        return Refuse(reason="oversized", detail=detail, about=_tree_of(parts[0]))
    if header > MAX_HEADER_BYTES or len(parts) > MAX_FRAMES:
        limits = f"at most {MAX_HEADER_BYTES} and {MAX_FRAMES}"
        return Refuse(reason="oversized", detail=f"a header of {header} bytes and {len(parts)} frames; {limits}")
    try:
        return _HUB_INPUT.validate_json(bytes(parts[0]))
    except ValidationError as error:
        return _explain(error)


def _tree_of(header: memoryview) -> str:
    """The tree whose upload is refused unread: its sender must learn which one to give up, or sends it for ever."""
    if header.nbytes > MAX_HEADER_BYTES:
        return ""
    try:
        message = _HUB_INPUT.validate_json(bytes(header))
    except ValidationError:
        return ""
    return message.tree_id if isinstance(message, TreeUpload) else ""


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
