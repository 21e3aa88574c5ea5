"""An MCP transport over a child process that no output of the child can break or slow down."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import anyio

from actors.tools.calls import CallDispatcher
from actors.tools.framing import MessageFraming, Reply
from actors.tools.heir import heir
from actors.tools.streams import Inbox, Outbox

STDERR_LINES = 20
"""Last lines of a server's stderr kept for error messages."""
STDERR_LINE_CHARACTERS = 500
CLOSE_GRACE_S = 1.0
"""How long a server may take to end after its input closed, and again after SIGTERM."""


@dataclass(frozen=True, slots=True)
class Command:
    """How to start a server."""

    argv: Sequence[str]
    env: Mapping[str, str]
    """All of it: nothing is inherited."""
    cwd: str | None
    max_line_bytes: int


class ServerProcess(asyncio.SubprocessProtocol):
    """A running server: its inbox, its last words and whether it still lives."""

    def __init__(self, max_line_bytes: int, on_end: Callable[[], None]) -> None:
        self.inbox = Inbox()
        self.calls: CallDispatcher | None = None
        self.framing = MessageFraming(max_line_bytes, self._answer)
        self.exited = anyio.Event()
        self.killed = False
        """Whether a signal ended it that was not ours."""
        self.last_output_at = asyncio.get_running_loop().time()
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES)
        self._stderr_rest = b""
        self._drained = anyio.Event()
        self._on_end = on_end

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """asyncio: output came."""
        if fd == 1:
            self.last_output_at = asyncio.get_running_loop().time()
            if messages := self.framing.feed(data):
                self.inbox.put(messages)
            return
        *lines, rest = (self._stderr_rest + data[-65_536:]).split(b"\n")
        self._stderr.extend(line.decode("utf-8", "replace")[:STDERR_LINE_CHARACTERS] for line in lines if line.strip())
        self._stderr_rest = rest[-STDERR_LINE_CHARACTERS:]

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        """asyncio: one of the three pipes closed."""
        if fd == 1:
            self._end()
        elif fd == 2:
            self._drained.set()

    def process_exited(self) -> None:
        """asyncio: the process ended (its output may still be in the pipe)."""
        self.exited.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio: process and pipes are all gone."""
        self._drained.set()
        self._end()

    def last_words(self) -> str:
        """The last lines of stderr, in one line."""
        lines = [*self._stderr, self._stderr_rest.decode("utf-8", "replace")]
        return " | ".join(line.strip() for line in lines if line.strip())

    async def drain_stderr(self) -> None:
        """Wait (briefly) until stderr is read to its end."""
        with anyio.move_on_after(0.5):
            await self._drained.wait()

    def _answer(self, request_id: int, reply: Reply) -> bool:
        return self.calls is not None and self.calls.answer(request_id, reply)

    def _end(self) -> None:
        if self.calls is not None:
            self.calls.end()
        self.inbox.end()
        self._on_end()


@asynccontextmanager
async def start_process(
    command: Command, *, on_end: Callable[[], None]
) -> AsyncIterator[tuple[ServerProcess, CallDispatcher]]:
    """Run a server in its own process group for the length of the block; `on_end` is called when its output ends.

    Raises `OSError` when it cannot be started.
    """
    loop = asyncio.get_running_loop()
    # A start that is cancelled half-way would leave a process that nobody stops.
    with anyio.CancelScope(shield=True):
        transport, process = await loop.subprocess_exec(
            lambda: ServerProcess(command.max_line_bytes, on_end),
            *command.argv,
            env=command.env,
            cwd=command.cwd,
            start_new_session=True,
        )
        heir().gains(transport.get_pid())
    stdin = transport.get_pipe_transport(0)
    # uvloop's transports are no subclasses of asyncio's, so there is nothing to narrow by isinstance.
    outbox = Outbox(stdin)  # type: ignore[arg-type]
    process.calls = CallDispatcher(process.inbox, outbox)
    try:
        yield process, process.calls
    finally:
        with anyio.CancelScope(shield=True):
            await _stop(transport, process, outbox)


async def _stop(transport: asyncio.SubprocessTransport, process: ServerProcess, outbox: Outbox) -> None:
    await outbox.aclose()
    for signal_number in (None, signal.SIGTERM, signal.SIGKILL):
        if signal_number is not None:
            _signal_group(transport, signal_number)
        with anyio.move_on_after(CLOSE_GRACE_S):
            await process.exited.wait()
            process.killed = signal_number is None and (transport.get_returncode() or 0) < 0
            break
    # Whatever the server left behind in its group goes with it.
    _signal_group(transport, signal.SIGKILL)
    heir().loses(transport.get_pid())
    transport.close()


def _signal_group(transport: asyncio.SubprocessTransport, number: signal.Signals) -> None:
    """Signal the server and what it started; nothing happens when all are gone."""
    with suppress(ProcessLookupError):
        os.killpg(transport.get_pid(), number)
