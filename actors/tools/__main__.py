"""`matpo tools list|check|call`: see what the configured MCP servers offer, and try a tool by hand."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import structlog
from pydantic import JsonValue
from rich.console import Console
from rich.table import Table

from actors.setting import tool_variables
from actors.tools.plane import ToolPlane
from matpo.config import Config
from matpo.errors import UserError, run_command
from matpo.load import load_config


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="matpo tools", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="start every configured server and show its tools")
    listing.add_argument("config", type=Path)
    listing.add_argument("override", nargs="*", help="section.key=value")
    listing.add_argument("--json", action="store_true", help="names, descriptions and whole schemas as JSON")
    checking = commands.add_parser("check", help="start every configured server and look up each role's tools")
    checking.add_argument("config", type=Path)
    checking.add_argument("override", nargs="*", help="section.key=value")
    calling = commands.add_parser("call", help="call one tool and print what the model would read")
    calling.add_argument("config", type=Path)
    calling.add_argument("tool", help="as the model calls it; see `list`")
    calling.add_argument("arguments", nargs="?", default="{}", help='JSON object, for example \'{"query": "Paris"}\'')
    calling.add_argument("override", nargs="*", help="section.key=value")
    return parser


async def _list(config: Config, folder: Path, *, as_json: bool) -> int:
    async with ToolPlane.open(config.tools, variables=tool_variables(config, folder=folder)) as plane:
        specs = plane.specs(["*"]) if config.tools.mcpServers or config.tools.file else ()
    if as_json:
        rows = [
            {"name": s.name, "server": s.server, "description": s.description, "parameters": s.parameters}
            for s in specs
        ]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return 0
    table = Table("tool", "server", "arguments", "description")
    for spec in specs:
        table.add_row(
            spec.name,
            spec.server,
            _signature(spec.parameters.get("properties"), spec.parameters.get("required")),
            spec.description,
        )
    Console().print(table)
    return 0


def _signature(properties: JsonValue, required: JsonValue) -> str:
    """One argument a line: its name, `?` when optional, and its type."""
    if not isinstance(properties, dict):
        return ""
    needed = required if isinstance(required, list) else []
    return "\n".join(
        f"{name}{'' if name in needed else '?'}: {schema.get('type', 'any') if isinstance(schema, dict) else 'any'}"
        for name, schema in properties.items()
    )


async def _check(config: Config, folder: Path) -> int:
    async with ToolPlane.open(config.tools, variables=tool_variables(config, folder=folder)) as plane:
        for name, role in config.episode.roles.items():
            try:
                plane.specs(role.tools)
            except UserError as error:
                raise UserError(f"episode.roles.{name}.tools: {error}") from error
    return 0


async def _call(config: Config, folder: Path, *, tool: str, arguments: dict[str, JsonValue]) -> int:
    async with ToolPlane.open(config.tools, variables=tool_variables(config, folder=folder)) as plane:
        result = await plane.call(tool, arguments)
    print(result.text)
    where = f"{result.server}__{result.tool}" if result.server else result.tool
    print(f"{where}: {result.outcome}, {result.seconds * 1e3:.1f} ms, {result.result_bytes:,} bytes", file=sys.stderr)
    return 0 if result.outcome == "ok" else 1


def _arguments(text: str) -> dict[str, JsonValue]:
    try:
        arguments = json.loads(text)
    except ValueError as error:
        raise UserError(f"arguments {text!r} are not JSON ({error}); write them as '{{\"name\": value}}'") from error
    if not isinstance(arguments, dict):
        raise UserError(f"arguments {text!r} must be a JSON object, as '{{\"name\": value}}'")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = _parser().parse_args(argv)
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    config = load_config(options.config, options.override)
    with tempfile.TemporaryDirectory(prefix="matpo-tools-") as folder:
        if options.command == "list":
            return asyncio.run(_list(config, Path(folder), as_json=options.json))
        if options.command == "check":
            return asyncio.run(_check(config, Path(folder)))
        arguments = _arguments(options.arguments)
        return asyncio.run(_call(config, Path(folder), tool=options.tool, arguments=arguments))


if __name__ == "__main__":
    sys.exit(run_command(main))
