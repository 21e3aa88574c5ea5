"""Serve a handful of tools over MCP (stdio or streamable HTTP) with as little work per call as the SDK allows."""

from __future__ import annotations

import argparse
import asyncio
import errno
import os
import socket
import stat
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import mcp_types as types
import uvicorn
import uvloop
from mcp import MCPError
from mcp.server import Server
from mcp.server.context import ServerRequestContext
from mcp.server.stdio import stdio_server
from pydantic import JsonValue

from tool_servers.blocklist import Blocklist, read_blocklist
from tool_servers.disconnect import CancelWhenClientLeaves
from tool_servers.stdio import pipe_streams

Arguments = Mapping[str, JsonValue]
VERSION = "0.1.0"


class BadCall(Exception):
    """What the caller did wrong and how to do it right; returned to it as a tool error."""


class Unavailable(Exception):
    """The tool could not do its work, whatever was asked: a protocol error, so that no caller is blamed for it."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a tool answers: text for the model and, for programs, facts about the call (`_meta`)."""

    text: str
    meta: dict[str, JsonValue] | None = None
    is_error: bool = False
    structured: dict[str, JsonValue] | None = None
    """The same in parts, for programs (`structuredContent`)."""


@dataclass(frozen=True, slots=True)
class ServedTool:
    """One tool: what a client sees of it and what runs when it is called."""

    name: str
    description: str
    parameters: dict[str, JsonValue]
    """JSON schema of the arguments."""
    call: Callable[[Arguments], Reply | Awaitable[Reply]]
    """Raises `BadCall` for arguments it cannot use, and, unless it is quick, `Unavailable`."""
    quick: bool = False
    """It takes well under a millisecond, and `call` returns the reply itself."""


@dataclass(frozen=True, slots=True)
class Service:
    """A server: its name, what it says about itself, and its tools."""

    name: str
    instructions: str
    tools: tuple[ServedTool, ...]
    running: Callable[[], AbstractAsyncContextManager[None]] = nullcontext
    """Held open while serving: what the tools need alive."""


def add_transport_options(parser: argparse.ArgumentParser) -> None:
    """The options every server shares."""
    parser.add_argument("--http", type=int, metavar="PORT", help="serve streamable HTTP on this port (0: any free one)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on with --http (default %(default)s)")


def add_blocklist_option(parser: argparse.ArgumentParser) -> None:
    """`--blocklist`, the same for the servers that reach the web."""
    parser.add_argument("--blocklist", type=Path, metavar="FILE",
                        help="sites and pages never shown or read, one a line (# starts a comment)")  # fmt: skip


def blocklist_option(options: argparse.Namespace) -> Blocklist:
    """What `--blocklist` names, read; ends the server when it cannot be."""
    if options.blocklist is None:
        return Blocklist()
    try:
        return read_blocklist(options.blocklist)
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--blocklist {str(options.blocklist)!r} cannot be read ({error})")


def serve(service: Service, *, http: int | None, host: str) -> int:
    """Serve until the client closes stdin (stdio) or the process is signalled (HTTP)."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(service, http, host))
    return 0


async def _serve(service: Service, http: int | None, host: str) -> None:
    async with service.running():
        await (_serve_http(service, http, host) if http is not None else _serve_stdio(service))


def text_argument(arguments: Arguments, name: str) -> str:
    """A required argument that must be text with something in it."""
    value = arguments.get(name)
    if not isinstance(value, str) or not value.strip():
        raise BadCall(f"argument {name!r} must be a non-empty string, got {value!r}")
    return value


def whole_argument(arguments: Arguments, name: str, *, default: int, low: int, high: int) -> int:
    """An optional whole-number argument between `low` and `high`."""
    value = arguments.get(name, default)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise BadCall(f"argument {name!r} must be a whole number from {low} to {high}, got {value!r}")
    return value


def fail(message: str) -> NoReturn:
    """End a server that cannot start: one line on stderr, exit code 2."""
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(2)


def _server(service: Service) -> Server[dict[str, object]]:
    listing = types.ListToolsResult(
        tools=[types.Tool(name=t.name, description=t.description, input_schema=t.parameters) for t in service.tools]
    )

    async def list_tools(
        _context: ServerRequestContext[dict[str, object]], _params: types.PaginatedRequestParams | None
    ) -> types.ListToolsResult:
        return listing

    async def call_tool(
        _context: ServerRequestContext[dict[str, object]], params: types.CallToolRequestParams
    ) -> types.CallToolResult:
        try:
            reply = _find(service, params.name, params.arguments or {}).call(params.arguments or {})
            reply = reply if isinstance(reply, Reply) else await reply
        except BadCall as error:
            reply = Reply(str(error), is_error=True)
        except Unavailable as error:
            raise MCPError(code=types.INTERNAL_ERROR, message=str(error)) from error
        return types.CallToolResult(
            content=[types.TextContent(text=reply.text)],
            structured_content=reply.structured,
            is_error=reply.is_error,
            _meta=reply.meta,
        )

    server = Server(
        service.name,
        version=VERSION,
        instructions=service.instructions,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
    )
    # The SDK's only default middleware opens a tracing span per message; nothing here exports spans.
    server.middleware.clear()
    return server


def quick_result(service: Service, params: Mapping[str, JsonValue]) -> Mapping[str, JsonValue] | None:
    """The result of a tools/call if its tool is quick, as it goes on the wire; None for the SDK to handle."""
    name, arguments = params.get("name"), params.get("arguments") or {}
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    try:
        tool = _find(service, name, arguments)
        if not tool.quick:
            return None
        reply = tool.call(arguments)
    except BadCall as error:
        reply = Reply(str(error), is_error=True)
    assert isinstance(reply, Reply), "a quick tool replies at once"
    result: dict[str, JsonValue] = {"content": [{"type": "text", "text": reply.text}], "isError": reply.is_error}
    return result if reply.meta is None else {**result, "_meta": reply.meta}


def _find(service: Service, name: str, arguments: Arguments) -> ServedTool:
    """The tool of that name. Raises `BadCall` when there is none or it does not know an argument."""
    for tool in service.tools:
        if tool.name == name:
            properties = tool.parameters["properties"]
            assert isinstance(properties, dict), "a served tool declares its properties"
            for argument in arguments:
                if argument not in properties:
                    raise BadCall(f"{name} has no argument {argument!r}")
            return tool
    raise BadCall(f"unknown tool {name!r}; this server has {', '.join(sorted(tool.name for tool in service.tools))}")


async def _serve_stdio(service: Service) -> None:
    server = _server(service)
    options = server.create_initialization_options()
    if all(_is_pipe(fd) for fd in (0, 1)):
        async with pipe_streams(partial(quick_result, service)) as (read, write):
            await server.run(read, write, options)
    else:
        async with stdio_server() as (read_file, write_file):
            await server.run(read_file, write_file, options)


def _is_pipe(fd: int) -> bool:
    mode = os.fstat(fd).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


async def _serve_http(service: Service, port: int, host: str) -> None:
    app = _server(service).streamable_http_app(json_response=True, stateless_http=True, host=host)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be bound ({error.strerror})"
            fail(f"{host}:{port} {reason}; choose another --http PORT (0 takes any free one)")
        # From here on connections are queued, so the announcement is true before the first request is served.
        listener.listen(1_024)
        where = f"[{host}]" if ":" in host else host
        sys.stderr.write(f"{service.name}: serving http://{where}:{listener.getsockname()[1]}/mcp\n")
        sys.stderr.flush()
        config = uvicorn.Config(CancelWhenClientLeaves(app), log_level="warning", access_log=False, lifespan="on")
        await uvicorn.Server(config).serve(sockets=[listener])
