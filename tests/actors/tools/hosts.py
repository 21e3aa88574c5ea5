"""Planes of hostile servers, for tests."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
from pydantic import JsonValue

from actors.tools.plane import ToolPlane, ToolResult
from matpo.config import Tools

HOSTILE = str(Path(__file__).with_name("hostile.py"))
VARIABLES = {"PYTHON": sys.executable}


def entry(*options: str, **extras: JsonValue) -> dict[str, JsonValue]:
    """The configuration of a hostile server."""
    matpo: JsonValue = {"bare_names": True, **extras}
    return {"command": "${PYTHON}", "args": ["-S", HOSTILE, *options], "matpo": matpo}


def once(folder: Path, act: str, *options: str, **extras: JsonValue) -> dict[str, JsonValue]:
    """A hostile server that does `act` (in the shell, as its own process) at its first start, before it says a word."""
    first = f"test -e {folder}/once || {{ touch {folder}/once; {act}; }}"
    words = f"{first}; exec {sys.executable} -S {HOSTILE} {' '.join(options)}"
    return entry(*options, **extras) | {"command": "sh", "args": ["-c", words]}


FREEZE = "kill -STOP $$"


@asynccontextmanager
async def hostile(*options: str, cache_file: Path | None = None, **extras: JsonValue) -> AsyncIterator[ToolPlane]:
    """A plane with one hostile server."""
    more = {} if cache_file is None else {"cache_file": cache_file}
    tools = Tools.model_validate({"mcpServers": {"hostile": entry(*options, **extras)}, **more})
    with anyio.fail_after(30):
        async with ToolPlane.open(tools, variables=VARIABLES) as plane:
            yield plane


async def call(plane: ToolPlane, tool: str, text: str = "hello") -> ToolResult:
    """Call a tool of a hostile server."""
    return await plane.call(tool, {"text": text})
