"""Opens the MCP session of a configured server: its process or its address, then the protocol both sides know."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import httpx2
import mcp_types as types
from mcp import Client, MCPError
from mcp.client import ClientSession
from mcp.client.session import IncomingMessage
from mcp.client.stdio import get_default_environment

from actors.tools.announcements import announcements
from actors.tools.failures import ToolFailed
from actors.tools.http import Endpoint, http_streams
from actors.tools.sse import open_sse
from actors.tools.stdio import Command, ServerProcess, start_process
from matpo.config import McpServer
from matpo.errors import UserError

CONNECTION_ERRORS = (
    MCPError,
    OSError,
    httpx2.HTTPError,
    httpx2.InvalidURL,
    anyio.BrokenResourceError,
    anyio.ClosedResourceError,
    anyio.EndOfStream,
    ValueError,
    TypeError,
    LookupError,
    RuntimeError,
)
"""What the SDK lets through when a connection fails. The last four: what odd messages of a server make it raise."""

Event = Callable[[], None]


class Connector:
    """Knows how to reach one server, and what it said last."""

    def __init__(self, name: str, entry: McpServer, *, handshake: bool) -> None:
        self.process: ServerProcess | None = None
        """The latest, over stdio."""
        self.handshake = handshake
        """Whether the server is asked for the handshake of protocols before 2026-07-28, which nearly all know."""
        self._name = name
        self._entry = entry

    @asynccontextmanager
    async def open(self, *, on_end: Event, on_new_tools: Event) -> AsyncIterator[ClientSession]:
        """A session for the length of the block. The task that opens it must be the one that closes it.

        Raises one of CONNECTION_ERRORS, `ToolFailed`, or `UserError` for a program or folder that does not exist.
        """

        async def heed(message: IncomingMessage) -> None:
            if isinstance(message, types.ToolListChangedNotification):
                on_new_tools()

        if self._entry.transport == "http":
            async with (
                Client(http_streams(self._endpoint()), mode="auto", message_handler=heed) as client,
                announcements(client.session, on_new_tools),
            ):
                yield client.session
            return
        if self._entry.transport == "sse":
            async with (
                open_sse(self._endpoint(), on_end=on_end) as calls,
                ClientSession(dispatcher=calls, message_handler=heed) as session,
            ):
                await self._negotiate(session)
                yield session
            return
        async with start_process(self._command(), on_end=on_end) as (process, calls):
            self.process = process
            try:
                async with ClientSession(dispatcher=calls, message_handler=heed) as session:
                    await self._negotiate(session)
                    async with announcements(session, on_new_tools):
                        yield session
            finally:
                await process.drain_stderr()

    def why_not_started(self, failure: str) -> str:
        """For whoever wrote the entry: what happened, and where to look."""
        if self._entry.command is None:
            # Without its query, which may hold a key.
            url = str(self._entry.url).partition("?")[0]
            return (
                f"tool server {self._name!r} at {url} cannot be used: {failure}; check the url and that it is running"
            )
        words = self.process.last_words() if self.process is not None else ""
        command = " ".join((self._entry.command, *self._entry.args))
        said = f"; its last lines: {words}" if words else "; it said nothing: run it by hand to see why"
        return f"tool server {self._name!r} did not start: {failure}; command: {command}{said}"

    def _endpoint(self) -> Endpoint:
        extras = self._entry.matpo
        assert self._entry.url is not None, "an entry has a command or a url"
        return Endpoint(
            url=self._entry.url,
            headers=self._entry.headers,
            timeout_s=max(extras.timeout_s, extras.start_timeout_s),
            max_inflight=extras.max_inflight,
            max_body_bytes=_most_bytes(extras.max_result_bytes),
        )

    def _command(self) -> Command:
        entry = self._entry
        assert entry.command is not None, "an entry has a command or a url"
        env = {**get_default_environment(), **entry.env}
        if entry.cwd is not None and not Path(entry.cwd).is_dir():
            raise UserError(f"tool server {self._name!r} did not start: its cwd {entry.cwd!r} is no folder; correct it")
        program = str(Path(entry.cwd or ".", entry.command)) if os.sep in entry.command else entry.command
        if shutil.which(program, path=env.get("PATH")) is None:
            raise UserError(
                f"tool server {self._name!r} did not start: there is no program {entry.command!r};"
                " install it or give its full path"
            )
        most = _most_bytes(entry.matpo.max_result_bytes)
        return Command(argv=(entry.command, *entry.args), env=env, cwd=entry.cwd, max_line_bytes=most)

    async def _negotiate(self, session: ClientSession) -> None:
        if not self.handshake:
            await session.discover()
            return
        try:
            await session.initialize()
        except RuntimeError as error:
            raise ToolFailed(str(error)) from error  # a protocol version of before the SDK's oldest


def _most_bytes(max_result_bytes: int) -> int:
    """JSON escapes may take six bytes a character; past that and some head-room an answer is a flood."""
    return 1_048_576 + 6 * max_result_bytes
