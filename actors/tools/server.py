"""One MCP server under supervision: started, called with deadlines, restarted; its faults stay its own."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

import anyio
import anyio.lowlevel
import mcp_types as types
import structlog
from mcp import MCPError
from mcp.client import ClientSession
from pydantic import JsonValue

from actors.tools.catalog import check_names, differences, offered, schema_hash
from actors.tools.connect import CONNECTION_ERRORS, Connector
from actors.tools.failures import ToolFailed, ToolRefused
from actors.tools.framing import DROPPED, TOO_LARGE
from actors.tools.http import TRANSPORT_FAILED
from matpo.config import McpServer
from matpo.errors import UserError

MOST_KILLED_STARTS = 3
"""A first start that a signal ended is tried again so often."""
MOST_SILENT_STARTS = 3
"""First starts without any answer: a server may be frozen once; after so many it is given up."""
BREAKER_AFTER = 5
"""Failures in a row (without one good answer between them) after which calls fail at once until the next restart."""
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 10.0
SILENT_TIMEOUTS = 3
"""Timed-out calls in a row, without a byte from the server, after which it is restarted."""
NO_ANSWER = "no answer"
MAX_PAGES = 100
"""Pages of tools/list read from one server."""
RELIST_PAUSE_S = 1.0
"""A server that announces new tools without end is not listed more often than this."""
CORPUS = "matpo/corpus"
"""Key in a listing's `_meta` under which a server may report the version of its data."""
_log = structlog.get_logger("tools")


@dataclass(frozen=True, slots=True)
class Facts:
    """What the latest start of a server showed."""

    protocol: str
    start_s: float
    """Until the protocol was agreed on."""
    list_s: float


class ToolServer:
    """The one owner of a connection. `run` keeps it up; `call` may be used by any number of tasks."""

    def __init__(self, name: str, entry: McpServer, *, restarts: bool = True, handshake: bool = True) -> None:
        self.name = name
        self.listing: tuple[types.Tool, ...] = ()
        """All of its tools, as listed at the first start; a restarted server is expected to offer them still."""
        self.tools: tuple[types.Tool, ...] = ()
        """Those that the entry allows and that can be used, sorted by name."""
        self.facts: Facts | None = None
        self.losses = 0
        """Connections lost so far."""
        self.inflight = 0
        """Calls under way or waiting here."""
        self.corpus = ""
        """Version of the data behind the tools, if the server reports one."""
        self._connector = Connector(name, entry, handshake=handshake)
        self._extras = entry.matpo
        self._restarts = restarts
        self._slots = anyio.Semaphore(self._extras.max_inflight, fast_acquire=True)
        self._scope = anyio.CancelScope()
        self._first_failure = ""
        self._session: ClientSession | None = None
        self._changed = anyio.Event()
        self._lost, self._wake = anyio.Event(), anyio.Event()
        self._started = anyio.Event()
        self._refusal: UserError | None = None
        self._ended = False
        self._failures = self._killed_starts = self._silent_starts = 0
        self._began_at = math.inf
        self._reason = "not started yet"
        self._silent_timeouts = 0
        self._unreached = 0
        """Requests in a row that got no answer over HTTP."""
        self._answered_at = -math.inf
        self._busy_since = -math.inf

    @property
    def up(self) -> bool:
        """Whether a call would find a connection."""
        return self._session is not None

    @property
    def silent_s(self) -> float:
        """Seconds for which calls have been under way without any answer."""
        return anyio.current_time() - max(self._busy_since, self._heard_at) if self.inflight else 0.0

    @property
    def starting_s(self) -> float:
        """Seconds since the first start began; 0 once it has ended."""
        return 0.0 if self._started.is_set() else max(0.0, anyio.current_time() - self._began_at)

    @property
    def _heard_at(self) -> float:
        process = self._connector.process
        return self._answered_at if process is None else process.last_output_at

    @property
    def handshake(self) -> bool:
        """Whether it knows the handshake of protocols before 2026-07-28; known once it has started."""
        return self._connector.handshake

    async def ready(self) -> None:
        """Wait for the first start. Raises `UserError` with the command and the server's last words if it failed."""
        await self._started.wait()
        if self._refusal is not None:
            raise self._refusal

    def stop(self) -> None:
        """End the connection, and with it `run`."""
        self._scope.cancel()

    async def run(self) -> None:
        """Connect, and again after growing pauses whenever the connection is lost. Ends if the first start fails."""
        self._began_at = anyio.current_time()
        with self._scope:
            # It may have been stopped before its turn came.
            while not self._scope.cancel_called and await self._connect_and_hold():
                pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (self._failures - 1))
                _log.warning("tool server lost", server=self.name, reason=self._reason, restart_in_s=pause_s)
                # Not all clients of a server that comes back at the same moment.
                await anyio.sleep(pause_s * random.uniform(0.7, 1.0))
        self._end()

    async def call(self, tool: str, arguments: Mapping[str, JsonValue]) -> types.CallToolResult:
        """Call a tool. Raises `ToolFailed` (in time, whatever the server does) or `ToolRefused`."""
        began = anyio.current_time()
        if not self.inflight:
            self._busy_since = began
        self.inflight += 1
        try:
            # The deadline covers waiting for a slot, for a restart, the write and the answer.
            with anyio.move_on_after(self._extras.timeout_s):
                async with self._slots:
                    return await self._ask(await self._connected(), tool, arguments)
        finally:
            self.inflight -= 1
        self._note_silence(began)
        raise ToolFailed(f"no answer from server {self.name!r} within {self._extras.timeout_s:g} s")

    async def _ask(self, session: ClientSession, tool: str, arguments: Mapping[str, JsonValue]) -> types.CallToolResult:
        try:
            result = await session.call_tool(tool, dict(arguments), allow_input_required=True)
        except MCPError as error:
            raise self._meaning(error, session) from error
        except (anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream) as error:
            raise ToolFailed(f"server {self.name!r} ended during the call") from error
        except CONNECTION_ERRORS as error:
            raise ToolFailed(f"server {self.name!r} sent an invalid result ({type(error).__name__})") from error
        if not isinstance(result, types.CallToolResult):
            raise ToolFailed(f"server {self.name!r} asks for input, which nobody here can give")
        self._failures = self._silent_timeouts = self._unreached = 0
        self._answered_at = anyio.current_time()
        return result

    async def _connected(self) -> ClientSession:
        while self._session is None:
            if self._ended:
                raise ToolFailed(f"server {self.name!r} has ended, and with it what it held ({self._reason})")
            if self._failures >= BREAKER_AFTER:
                # A caller that tries again and again must not keep the owner from running.
                await anyio.lowlevel.checkpoint()
                raise ToolFailed(f"server {self.name!r} is down ({self._reason}); it is being restarted")
            await self._changed.wait()
        return self._session

    def _meaning(self, error: MCPError, session: ClientSession) -> ToolFailed | ToolRefused:
        if error.code == types.INVALID_PARAMS:
            return ToolRefused(error.message)
        if error.code == types.CONNECTION_CLOSED:
            if session is self._session:
                self._lose("the connection ended")
            return ToolFailed(f"server {self.name!r} ended during the call")
        if error.code == TOO_LARGE:
            return ToolFailed(f"server {self.name!r}: {error.message}")
        if error.code == TRANSPORT_FAILED:
            self._unreached += 1
            if self._unreached >= BREAKER_AFTER and session is self._session:
                self._lose(error.message)
            return ToolFailed(f"server {self.name!r}: {error.message}")
        if self._connector.process is None and "session" in error.message.lower() and session is self._session:
            # A restarted server knows no session of before: a new connection is the only way on.
            self._lose(error.message)
        return ToolFailed(f"server {self.name!r} answered with error {error.code}: {error.message}")

    def _note_silence(self, began: float) -> None:
        if self._session is None or self._heard_at > began:
            return
        self._silent_timeouts += 1
        if self._silent_timeouts >= SILENT_TIMEOUTS:
            self._lose("it answers nothing")

    def _lose(self, reason: str) -> None:
        """Give the connection up: no call may start on it any more, and its owner makes a new one."""
        self._session = None
        self._reason = reason
        self._silent_timeouts = self._unreached = 0
        self._lost.set()
        self._wake.set()

    async def _connect_and_hold(self) -> bool:
        """One connection, from its start to its loss; whether there should be another."""
        refused = False
        try:
            failure = await self._connection()
        except UserError as error:
            failure, refused = str(error), True
        if self._started.is_set():
            self._failures = max(self._failures + 1, BREAKER_AFTER if refused else 0)
            self.losses += 1
            self._reason = failure
            self._notify()
            return self._restarts
        process, silent = self._connector.process, failure.startswith(NO_ANSWER)
        if process is not None and process.killed and self._killed_starts < MOST_KILLED_STARTS:
            self._killed_starts += 1  # it says nothing about the server
            return await self._connect_and_hold()
        if silent:
            self._silent_starts += 1
            if self._silent_starts < MOST_SILENT_STARTS:
                pause_s = FIRST_PAUSE_S * 2.0**self._silent_starts
                _log.warning("tool server did not start", server=self.name, reason=failure, restart_in_s=pause_s)
                await anyio.sleep(pause_s)
                return await self._connect_and_hold()
            failure += f", {self._silent_starts} starts in a row; raise its matpo.start_timeout_s if it needs longer"
        if self._connector.handshake and process is not None and not silent and not refused:
            # Nearly every server knows the handshake; one that refuses it may be of the newer, stateless kind.
            self._connector.handshake = False
            self._first_failure = failure
            return await self._connect_and_hold()
        why = failure if refused else self._connector.why_not_started(self._first_failure or failure)
        self._refusal = UserError(why)
        self._started.set()
        return False

    async def _connection(self) -> str:
        """Hold one connection until it is lost; returns why it ended. Raises `UserError`."""
        began = anyio.current_time()
        lost = self._lost = anyio.Event()

        def ended() -> None:
            # The last words of an earlier process must not end the connection to its successor.
            if self._lost is lost:
                self._lose("the connection ended")

        with anyio.CancelScope(deadline=began + self._extras.start_timeout_s) as scope:
            try:
                # The SDK lets only the task that opened a session close it, so all of it happens in this one.
                async with self._connector.open(on_end=ended, on_new_tools=lambda: self._wake.set()) as session:
                    start_s = anyio.current_time() - began
                    listing = await self._list(session)
                    self.facts = Facts(session.protocol_version or "?", start_s, anyio.current_time() - began - start_s)
                    self._up(session, listing)
                    while not lost.is_set():
                        scope.deadline = math.inf
                        await self._wake.wait()
                        with anyio.move_on_after(RELIST_PAUSE_S):
                            await lost.wait()
                        if not lost.is_set():
                            self._wake = anyio.Event()
                            scope.deadline = anyio.current_time() + self._extras.start_timeout_s
                            self._compare(await self._list(session))
                    return self._reason
            except (*CONNECTION_ERRORS, ToolFailed) as error:
                return self._reason if lost.is_set() else f"{error}" or type(error).__name__
            except ExceptionGroup as group:
                reason = _expected(group)
                return self._reason if lost.is_set() else reason
            finally:
                self._session = None
        return f"{NO_ANSWER} within {self._extras.start_timeout_s:g} s"

    def _up(self, session: ClientSession, listing: tuple[types.Tool, ...]) -> None:
        if self._started.is_set():
            self._compare(listing)
        else:
            check_names(self.name, listing, self._extras)
            self.listing, self.tools = listing, offered(self.name, listing, self._extras)
            self._check_pin(self.tools)
        self._wake = anyio.Event()
        self._session = session
        self._started.set()
        self._notify()

    def _compare(self, listing: tuple[types.Tool, ...]) -> None:
        """Prompts keep the tools they were made with; what is no longer so is told to whoever reads the log."""
        now = offered(self.name, listing, self._extras)
        if found := differences(self.tools, now):
            _log.warning("tool server changed its tools; prompts keep the old ones", server=self.name, **found)
        self._check_pin(now)

    def _check_pin(self, tools: tuple[types.Tool, ...]) -> None:
        if self._extras.pin is not None and (found := schema_hash(tools)) != self._extras.pin:
            raise UserError(
                f"tool server {self.name!r} offers other tools than those pinned (schema hash {self._extras.pin});"
                f' look at them with `matpo tools list`, then set matpo.pin = "{found}"'
            )

    def _end(self) -> None:
        self._ended = True
        self._lose("it was stopped" if self._reason == "not started yet" else self._reason)
        if not self._started.is_set():
            self._refusal = UserError(f"tool server {self.name!r} was stopped while it started")
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
            corpus = (page.meta or {}).get(CORPUS)
            self.corpus = corpus if isinstance(corpus, str) else self.corpus
            tools.update({tool.name: tool for tool in page.tools})
            cursor = page.next_cursor
            if cursor is None:
                break
        return tuple(tools[name] for name in sorted(tools))


def _expected(group: ExceptionGroup) -> str:
    """The first error of a lost connection in words. Raises anything else in the group."""
    _, unknown = group.split((*CONNECTION_ERRORS, ToolFailed))
    if unknown is not None:
        users, others = unknown.split(UserError)
        raise unknown if others is not None or users is None else _leaf(users)
    error = _leaf(group)
    return f"{error}" or type(error).__name__


def _leaf(group: ExceptionGroup) -> Exception:
    error: Exception = group
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
