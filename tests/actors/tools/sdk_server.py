"""A small server of the SDK: `python sdk_server.py stdio`, or `http|sse PORT`, which says its URL first."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys

import uvicorn
from mcp.server import MCPServer
from mcp.server.mcpserver import Context

server = MCPServer("echo")


@server.tool(structured_output=False)
async def echo(text: str) -> str:
    """Say it again."""
    return text


@server.tool(structured_output=False)
async def long(size: int) -> str:
    """Many characters."""
    return "x" * size


@server.tool(structured_output=False)
async def slow(seconds: float) -> str:
    """Takes its time."""
    await asyncio.sleep(seconds)
    return "done"


@server.tool(structured_output=False)
async def freeze() -> str:
    """The whole process stops."""
    os.kill(os.getpid(), signal.SIGSTOP)
    return "awake"


@server.tool(structured_output=False)
async def fail() -> str:
    """Always fails."""
    raise LookupError("nothing there")


@server.tool(structured_output=False)
async def learn(name: str, context: Context) -> str:
    """The server has one tool more, and says so to whoever listens."""
    server.add_tool(echo, name=name)
    await context.notify_tools_changed()
    return name


@server.tool(structured_output=False)
async def pid(text: str) -> str:
    """Of this process."""
    return str(os.getpid())


kind = sys.argv[1]
if kind == "stdio":
    server.run()
    raise SystemExit
listener = socket.create_server(("127.0.0.1", int(sys.argv[2])))
sys.stdout.write(f"http://127.0.0.1:{listener.getsockname()[1]}/{'sse' if kind == 'sse' else 'mcp'}\n")
sys.stdout.flush()
app = server.sse_app() if kind == "sse" else server.streamable_http_app()
uvicorn.Server(uvicorn.Config(app, log_level="critical")).run(sockets=[listener])
