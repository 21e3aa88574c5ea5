"""One MCP server under supervision: started, called with deadlines, restarted; its faults stay its own."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import anyio
import httpx2
import mcp_types as types
import structlog
from mcp import Client, MCPError
from mcp.client import ClientSession
from pydantic import JsonValue, ValidationError

from actors.tools.framing import DROPPED, TOO_LARGE
from actors.tools.http import TRANSPORT_FAILED, http_streams
from actors.tools.stdio import Command, ServerProcess, start_process
from matpo.config import McpServer
from matpo.errors import UserError

BREAKER_AFTER = 5
"""Failures in a row (without one good answer between them) after which calls fail at once until the next restart."""
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 30.0
SILENT_TIMEOUTS = 3
"""Timed-out calls in a row, without a byte from the server, after which it is restarted."""
NO_ANSWER = "no answer"
MAX_PAGES = 100
"""Pages of tools/list read from one server."""

# What the SDK lets through when a connection fails.
CONNECTION_ERRORS = (
    MCPError,
    OSError,
    ValidationError,
    httpx2.HTTPError,
    httpx2.InvalidURL,
    anyio.BrokenResourceError,
    anyio.ClosedResourceError,
    anyio.EndOfStream,
)
_log = structlog.get_logger("tools")


class ToolFailed(Exception):
    """The server's or the network's fault: masked from the loss."""


class ToolRefused(Exception):
    """The server says the caller's arguments are wrong: the model's fault."""


class ToolServer:
    """The one owner of a connection. `run` keeps it up; `call` may be used by any number of tasks."""

    def __init__(self, name: str, entry: McpServer) -> None:
        self.name = name
        self.tools: tuple[types.Tool, ...] = ()
        """As listed at the first start, sorted by name; a restarted server is expected to offer them still."""
        self.restarts = 0
        self._entry = entry
        self._extras = entry.matpo
        self._slots = anyio.Semaphore(self._extras.max_inflight, fast_acquire=True)
        self._handshake = True
        self._first_failure = ""
        self._session: ClientSession | None = None
        self._process: ServerProcess | None = None
        self._changed = anyio.Event()
        self._lost = anyio.Event()
        self._started = anyio.Event()
        self._refusal: UserError | None = None
        self._failures = 0
        self._reason = "not started yet"
        self._silent_timeouts = 0

    async def ready(self) -> None:
        """Wait for the first start. Raises `UserError` with the command and the server's last words if it failed."""
        await self._started.wait()
        if self._refusal is not None:
            raise self._refusal

    async def run(self) -> None:
        """Connect, and again after growing pauses whenever the connection is lost. Ends if the first start fails."""
        while True:
            failure = await self._connect_once()
            if not self._started.is_set():
                if self._handshake and self._entry.command is not None and not failure.startswith(NO_ANSWER):
                    # Nearly every server knows the handshake; one that refuses it may be of the newer, stateless kind.
                    self._handshake = False
                    self._first_failure = failure
                    continue
                self._refusal = UserError(self._why_not_started(self._first_failure or failure))
                self._started.set()
                return
            self._failures += 1
            self.restarts += 1
            self._reason = failure
            self._notify()
            pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (self._failures - 1))
            _log.warning("tool server lost", server=self.name, reason=failure, restart_in_s=pause_s)
            await anyio.sleep(pause_s)

    async def call(self, tool: str, arguments: Mapping[str, JsonValue]) -> types.CallToolResult:
        """Call a tool, again where it is idempotent and the failure was not the model's.

        Raises `ToolFailed` (in time, whatever the server does) or `ToolRefused`.
        """
        attempts = 1 + (self._extras.retries if tool in self._extras.idempotent else 0)
        while True:
            attempts -= 1
            try:
                return await self._attempt(tool, arguments)
            except ToolFailed:
                if attempts == 0:
                    raise

    async def _attempt(self, tool: str, arguments: Mapping[str, JsonValue]) -> types.CallToolResult:
        began = anyio.current_time()
        # The deadline covers waiting for a slot, for a restart, the write and the answer.
        with anyio.move_on_after(self._extras.timeout_s):
            async with self._slots:
                session = await self._connected()
                try:
                    result = await session.call_tool(tool, dict(arguments), allow_input_required=True)
                except MCPError as error:
                    raise self._meaning(error, session) from error
                except ValidationError as error:
                    raise ToolFailed(f"server {self.name!r} sent an invalid result ({error.title})") from error
                if not isinstance(result, types.CallToolResult):
                    raise ToolFailed(f"server {self.name!r} asks for input, which nobody here can give")
                self._failures = self._silent_timeouts = 0
                return result
        self._note_silence(began)
        raise ToolFailed(f"no answer from server {self.name!r} within {self._extras.timeout_s:g} s")

    async def _connected(self) -> ClientSession:
        while self._session is None:
            if self._failures >= BREAKER_AFTER:
                raise ToolFailed(f"server {self.name!r} is down ({self._reason}); it is being restarted")
            await self._changed.wait()
        return self._session

    def _meaning(self, error: MCPError, session: ClientSession) -> ToolFailed | ToolRefused:
        if error.code == types.INVALID_PARAMS:
            return ToolRefused(error.message)
        if error.code == types.CONNECTION_CLOSED:
            if session is self._session:
                self._lose()
            return ToolFailed(f"server {self.name!r} ended during the call")
        if error.code in (TRANSPORT_FAILED, TOO_LARGE):
            return ToolFailed(f"server {self.name!r}: {error.message}")
        if self._entry.url is not None and "session" in error.message.lower():
            # A restarted server knows no session of before: a new connection is the only way on.
            self._lose()
        return ToolFailed(f"server {self.name!r} answered with error {error.code}: {error.message}")

    def _note_silence(self, began: float) -> None:
        if self._process is None or self._process.last_output_at > began:
            return
        self._silent_timeouts += 1
        if self._silent_timeouts >= SILENT_TIMEOUTS:
            self._lose()

    def _lose(self) -> None:
        """Give the connection up: no call may start on it any more, and its owner makes a new one."""
        self._session = None
        self._lost.set()

    async def _connect_once(self) -> str:
        """Hold one connection until it is lost; returns why it ended."""
        with anyio.CancelScope(deadline=anyio.current_time() + self._extras.start_timeout_s) as scope:
            try:
                # The SDK lets only the task that opened a session close it, so all of it happens in this one.
                async with self._open_session() as session:
                    tools = await self._list(session)
                    scope.deadline = math.inf
                    self._up(session, tools)
                    await self._lost.wait()
                    return "it answers nothing" if self._silent_timeouts else "the connection ended"
            except (*CONNECTION_ERRORS, ToolFailed) as error:
                return f"{error}" or type(error).__name__
            except ExceptionGroup as group:
                _, unknown = group.split(CONNECTION_ERRORS)
                if unknown is not None:
                    raise
                return _first_leaf(group)
            finally:
                self._session = None
                self._silent_timeouts = 0
        return f"{NO_ANSWER} within {self._extras.start_timeout_s:g} s"

    def _up(self, session: ClientSession, tools: tuple[types.Tool, ...]) -> None:
        if not self._started.is_set():
            self.tools = tools
        elif missing := {tool.name for tool in self.tools} - {tool.name for tool in tools}:
            _log.warning("tool server came back without some tools", server=self.name, missing=sorted(missing))
        self._session = session
        self._started.set()
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def _list(self, session: ClientSession) -> tuple[types.Tool, ...]:
        tools: dict[str, types.Tool] = {}
        cursor: str | None = None
        for _ in range(MAX_PAGES):
            page = await session.list_tools(params=types.PaginatedRequestParams(cursor=cursor) if cursor else None)
            for name in (page.meta or {}).get(DROPPED, []):
                _log.warning("tool dropped: it has no valid name and input schema", server=self.name, tool=name)
            tools.update({tool.name: tool for tool in page.tools if self._wanted(tool.name)})
            cursor = page.next_cursor
            if cursor is None:
                break
        return tuple(tools[name] for name in sorted(tools))

    def _wanted(self, tool: str) -> bool:
        return tool not in self._extras.deny and (not self._extras.allow or tool in self._extras.allow)

    @asynccontextmanager
    async def _open_session(self) -> AsyncIterator[ClientSession]:
        lost = self._lost = anyio.Event()
        extras = self._extras
        # JSON escapes may take six bytes a character; past that and some head-room the answer is a flood.
        most = 1_048_576 + 6 * extras.max_result_bytes
        if self._entry.command is None:
            assert self._entry.url is not None, "an entry has a command or a url"
            streams = http_streams(
                self._entry.url,
                self._entry.headers,
                timeout_s=max(extras.timeout_s, extras.start_timeout_s),
                max_inflight=extras.max_inflight,
                max_body_bytes=most,
            )
            async with Client(streams, mode="auto") as client:
                yield client.session
            return

        def ended() -> None:
            # The last words of an earlier process must not end the connection to its successor.
            if self._lost is lost:
                self._lose()

        argv = (self._entry.command, *self._entry.args)
        command = Command(argv=argv, env=self._entry.env, cwd=self._entry.cwd, max_line_bytes=most)
        async with start_process(command, on_end=ended) as (process, calls):
            self._process = process
            try:
                async with ClientSession(dispatcher=calls) as session:
                    await self._negotiate(session)
                    yield session
            finally:
                await process.drain_stderr()

    async def _negotiate(self, session: ClientSession) -> None:
        if not self._handshake:
            await session.discover()
            return
        try:
            await session.initialize()
        except RuntimeError as error:
            raise ToolFailed(str(error)) from error  # a protocol version of before the SDK's oldest

    def _why_not_started(self, failure: str) -> str:
        if self._entry.command is None:
            # Without its query, which may hold a key.
            url = str(self._entry.url).partition("?")[0]
            return f"tool server {self.name!r} at {url} cannot be used: {failure}; check the url and that it is running"
        words = self._process.last_words() if self._process is not None else ""
        command = " ".join((self._entry.command, *self._entry.args))
        said = f"; its last lines: {words}" if words else "; it said nothing: run it by hand to see why"
        return f"tool server {self.name!r} did not start: {failure}; command: {command}{said}"


def _first_leaf(group: ExceptionGroup) -> str:
    error: Exception = group
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return f"{error}" or type(error).__name__
