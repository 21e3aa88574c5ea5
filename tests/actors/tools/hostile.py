"""A hand-written MCP server over stdio that misbehaves on demand. Standard library only, so that it starts fast."""

from __future__ import annotations

import argparse
import base64
import json
import os
import signal
import sys
import threading
import time
from typing import TypedDict

Message = dict[str, object]


class Params(TypedDict):
    name: str
    arguments: dict[str, str]


class Call(TypedDict):
    id: int
    params: Params


SCHEMA = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
TOOLS = ("echo", "crash", "crash_once", "hang", "flood", "flood_id_last", "junk", "bad_utf8", "slow", "picture",
         "refuse", "tool_error", "lie", "pid", "peak", "environment", "grow", "stop_itself", "say", "deep")  # fmt: skip

MODERN: Message = {"resultType": "complete", "ttlMs": 0, "cacheScope": "private"}

lock = threading.Lock()
live = 0
peak = 0
grown = 0


def send(message: Message) -> None:
    with lock:
        sys.stdout.buffer.write(json.dumps(message).encode() + b"\n")
        sys.stdout.buffer.flush()


def raw(*pieces: bytes) -> None:
    with lock:
        for piece in pieces:
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()


def text(value: str, **more: bool) -> Message:
    return {"content": [{"type": "text", "text": value}], **more}


def answer(request: Call, options: argparse.Namespace) -> None:
    name, arguments = request["params"]["name"], request["params"].get("arguments", {})
    result = text(arguments.get("text", ""))
    if name == "crash":
        os._exit(7)
    if name == "crash_once":
        try:
            os.close(os.open(options.marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            pass
        else:
            os._exit(7)
    elif name == "hang":
        return
    elif name == "flood":
        start = b'{"jsonrpc": "2.0", "id": %d, "result": {"content": [{"type": "text", "text": "' % request["id"]
        raw(start, *[b"x" * 2**20] * 50, b'"}]}}\n')
        return
    elif name == "flood_id_last":
        start = b'{"result": {"content": [{"type": "text", "text": "'
        raw(start, b"x" * 2**23, b'"}]}, "jsonrpc": "2.0", "id": %d}\n' % request["id"])
        return
    elif name == "junk":
        raw(b"Starting up...\n\n{not json}\n[1, 2]\n{}\nnull\n")
    elif name == "bad_utf8":
        raw(
            b'\xff\xfe\x80\n{"jsonrpc": "2.0", "id": %d, "result": {"content": [{"type": "text", "text": "a\xffb"}]}}\n'
            % request["id"]
        )
        return
    elif name == "slow":
        time.sleep(float(arguments["text"]))
    elif name == "picture":
        result = {
            "content": [
                {"type": "text", "text": "Here:"},
                {"type": "image", "mimeType": "image/png", "data": base64.b64encode(b"12345").decode()},
                {"type": "resource_link", "name": "log", "uri": "file:///log"},
                {"type": "resource", "resource": {"uri": "file:///b", "mimeType": "a/b", "blob": "AAAA"}},
            ]
        }
    elif name == "refuse":
        send({"jsonrpc": "2.0", "id": request["id"], "error": {"code": -32602, "message": "text must rhyme"}})
        return
    elif name == "tool_error":
        result = text("no such page", isError=True)
    elif name == "lie":
        result = {"content": [{"type": "text"}]}
    elif name == "pid":
        result = text(str(os.getpid()))
    elif name == "peak":
        global live, peak
        with lock:
            live += 1
            peak = max(peak, live)
        time.sleep(0.01)
        with lock:
            live -= 1
        result = text(str(peak))
    elif name == "grow":
        global grown
        grown += 1
        send({"jsonrpc": "2.0", "method": "notifications/tools/list_changed"})
    elif name == "say":
        raw(arguments["text"].encode() + b"\n")
    elif name == "deep":
        raw(b'{"jsonrpc": "2.0", "id": %d, "result": {"content": [], "structuredContent": ' % request["id"]
            + b'{"a": ' * 900 + b"1" + b"}" * 900 + b"}}\n")  # fmt: skip
        return
    elif name == "stop_itself":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif name == "environment":
        result = text(json.dumps(sorted(os.environ)))
    if options.modern:
        result["resultType"] = "complete"
    send({"jsonrpc": "2.0", "id": request["id"], "result": result})


def listing(options: argparse.Namespace) -> Message:
    tools: list[Message] = [{"name": name, "inputSchema": SCHEMA} for name in TOOLS]
    tools += [{"name": f"grown_{number}", "inputSchema": SCHEMA} for number in range(grown)]
    if options.bad_schema:
        tools.insert(0, {"name": "bad", "inputSchema": {}})
        tools.append({"name": "huge", "inputSchema": {**SCHEMA, "description": "x" * 100_000}})
        deep: Message = {"type": "object"}
        for _ in range(400):
            deep = {"type": "object", "properties": {"a": deep}}
        tools.append({"name": "deepest", "inputSchema": deep})
        tools.insert(1, {"inputSchema": SCHEMA})
        tools.insert(2, {"name": "worse", "inputSchema": {"type": "object", "properties": {"a": {"type": "nonsense"}}}})
    return {"tools": tools, "_meta": {"matpo/corpus": options.corpus}} if options.corpus else {"tools": tools}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bad-schema", action="store_true")
    parser.add_argument("--strict", action="store_true", help="exit when the first message is not initialize")
    parser.add_argument("--modern", action="store_true", help="know no handshake, only protocol 2026-07-28")
    parser.add_argument("--slow-start", type=float, default=0.0)
    parser.add_argument("--corpus", default="", help="report this version of the data")
    parser.add_argument("--die", default="", help="say this on stderr and exit")
    parser.add_argument("--only-once", default="", help="a file; when it exists the server does not start again")
    parser.add_argument("--marker", default="")
    options = parser.parse_args()
    if options.die:
        sys.exit(options.die)
    if options.only_once:
        try:
            os.close(os.open(options.only_once, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            sys.exit("not again")
    raw(b"Welcome to the hostile server!\n")
    time.sleep(options.slow_start)
    first = True
    result: Message
    for line in sys.stdin:
        request = json.loads(line)
        method = request.get("method")
        if first and options.strict and method != "initialize":
            sys.exit("expected initialize")
        first = False
        if "id" not in request:
            continue
        if options.modern and method == "server/discover":
            result = {"supportedVersions": ["2026-07-28"], "capabilities": {"tools": {}}, **MODERN}
            send({"jsonrpc": "2.0", "id": request["id"], "result": result})
        elif options.modern and method == "tools/list":
            send({"jsonrpc": "2.0", "id": request["id"], "result": {**listing(options), **MODERN}})
        elif method == "initialize" and not options.modern:
            result = {
                "protocolVersion": "2025-06-18",
                "capabilities": {"tools": {}},
                "serverInfo": {"name": "hostile", "version": "1"},
            }
            send({"jsonrpc": "2.0", "id": request["id"], "result": result})
        elif method == "tools/list":
            send({"jsonrpc": "2.0", "id": request["id"], "result": listing(options)})
        elif method == "tools/call":
            threading.Thread(target=answer, args=(request, options), daemon=True).start()
        else:
            error = {"code": -32601, "message": "Method not found"}
            send({"jsonrpc": "2.0", "id": request["id"], "error": error})


if __name__ == "__main__":
    main()
