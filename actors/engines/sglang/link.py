"""The actor's end of a sender: a child process in SGLang's environment that shares a process group with one server."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from subprocess import PIPE
from typing import Final, Self

import anyio
import anyio.abc
import orjson
from anyio.streams.buffered import BufferedByteReceiveStream
from pydantic import BaseModel, ConfigDict, ValidationError

SENDER: Final = Path(__file__).with_name("sender.py")
LONGEST_REPLY_BYTES: Final = 2**16


class SenderLost(Exception):
    """The sender died, fell silent or could not send; the message says which."""


class _Reply(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    port: int = 0
    error: str = ""


class Sender:
    """One sender. After any `SenderLost` only `kill` is left to call."""

    def __init__(self, process: anyio.abc.Process, group: str) -> None:
        if process.stdout is None or process.stdin is None:
            raise ValueError("the sender's input and output must be pipes")
        self.group = group
        self.port = 0
        """Where the server finds the sender."""
        self._process = process
        self._commands = process.stdin
        self._replies = BufferedByteReceiveStream(process.stdout)

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    @classmethod
    async def start(
        cls, python: str, *, ranks: int, address: str, backend: str, deadline_s: float, log: Path | None
    ) -> Self:
        """Start the process; it waits for the `ranks` ranks of a server. Raises `SenderLost`."""
        group = f"matpo-{uuid.uuid4().hex}"
        # Isolated: neither our packages nor the modules beside the program may hide those of its environment.
        command = [python, "-I", str(SENDER), str(ranks), group, address, backend, str(deadline_s)]
        with (log or Path("/dev/null")).open("ab") as errors:
            try:
                process = await anyio.open_process(
                    command, stdin=PIPE, stdout=PIPE, stderr=errors, start_new_session=True
                )
            except OSError as error:
                raise SenderLost(f"{python} does not start: {error}") from error
        sender = cls(process, group)
        async with AsyncExitStack() as undo:
            undo.push_async_callback(sender.kill)
            sender.port = (await sender.reply(deadline_s=deadline_s)).port
            undo.pop_all()
        return sender

    async def command(self, content: Mapping[str, object]) -> None:
        """Ask for something; every command is answered by one `reply`."""
        try:
            await self._commands.send(orjson.dumps(content) + b"\n")
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise SenderLost("the sender has died") from error

    async def reply(self, *, deadline_s: float) -> _Reply:
        """The sender's next line."""
        try:
            with anyio.fail_after(deadline_s):
                line = await self._replies.receive_until(b"\n", LONGEST_REPLY_BYTES)
            reply = _Reply.model_validate_json(line)
        except TimeoutError as error:
            raise SenderLost(f"the sender did not answer within {deadline_s:g} s") from error
        except (anyio.IncompleteRead, anyio.EndOfStream, anyio.BrokenResourceError) as error:
            raise SenderLost("the sender has died") from error
        except ValidationError as error:
            raise SenderLost(f"the sender's answer cannot be read: {line[:200]!r}") from error
        if reply.error:
            raise SenderLost(f"the sender: {reply.error}")
        return reply

    async def kill(self) -> None:
        """End the process; what its server waits for then fails."""
        with anyio.CancelScope(shield=True):
            if self._process.returncode is None:
                self._process.kill()
            await self._process.wait()
            await self._process.aclose()
