"""An MCP server that costs as little as one can, to measure clients by: `python -m benchmarks.lean_mcp stdio|http`.

One tool, `echo`. Over HTTP it says its URL on stdout first.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys

import orjson
from pydantic import JsonValue

SCHEMA: JsonValue = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
INITIALIZED: JsonValue = {
    "protocolVersion": "2025-06-18",
    "capabilities": {"tools": {}},
    "serverInfo": {"name": "lean", "version": "1"},
}
LISTING: JsonValue = {"tools": [{"name": "echo", "description": "Say it again.", "inputSchema": SCHEMA}]}
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


def answer(line: bytes) -> bytes | None:
    """The answer to a message; None to a notification."""
    request = orjson.loads(line)
    if "id" not in request:
        return None
    reply: dict[str, JsonValue] = {"jsonrpc": "2.0", "id": request["id"]}
    match request["method"]:
        case "tools/call":
            text = request["params"]["arguments"]["text"]
            reply["result"] = {"content": [{"type": "text", "text": text}], "isError": False}
        case "initialize":
            reply["result"] = INITIALIZED
        case "tools/list":
            reply["result"] = LISTING
        case _:
            reply["error"] = {"code": -32601, "message": "Method not found"}
    return orjson.dumps(reply)


def serve_stdio() -> None:
    """Until stdin ends. What a read brings is answered by one write."""
    rest = b""
    while data := os.read(0, 1 << 20):
        *lines, rest = (rest + data).split(b"\n")
        answers = [made for line in lines if (made := answer(line)) is not None]
        if answers:
            os.write(1, b"\n".join(answers) + b"\n")


async def serve_http() -> None:
    """Until killed."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, ConnectionError):
                break
            length = _LENGTH.search(head)
            made = answer(await reader.readexactly(int(length[1]))) if length is not None else None
            if not head.startswith(b"POST"):
                writer.write(b"HTTP/1.1 405 Method Not Allowed\r\ncontent-length: 0\r\n\r\n")
            elif made is None:
                writer.write(b"HTTP/1.1 202 Accepted\r\ncontent-length: 0\r\n\r\n")
            else:
                start = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
                writer.write(start % len(made) + made)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    sys.stdout.write(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/mcp\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    if sys.argv[1] == "http":
        asyncio.run(serve_http())
    else:
        serve_stdio()
