"""`matpo tools list|check|call|bench`: see what the configured MCP servers offer, and try a tool by hand."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
from pydantic import JsonValue
from rich.console import Console
from rich.table import Table

from actors.setting import tool_variables
from actors.tools.bench import LEVELS, for_bench, measure
from actors.tools.check import check_roles, check_servers
from actors.tools.expand import configured_entries
from actors.tools.mcp_file import is_mcp_file
from actors.tools.plane import ToolPlane
from matpo.config import Role, Tools
from matpo.errors import UserError, run_command
from matpo.load import load_config


@dataclass(frozen=True, slots=True)
class _Setting:
    """What the command works on."""

    tools: Tools
    variables: Mapping[str, str]
    roles: Mapping[str, Role]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="matpo tools", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str, *, one_tool: bool = False) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.add_argument("config", type=Path, help="a config, or an MCP file such as .mcp.json")
        if one_tool:
            made.add_argument("server", help="as the config names it")
            made.add_argument("tool", help="as the server names it; see `list`")
            made.add_argument("arguments", nargs="?", default="{}", help='JSON object, such as \'{"query": "Paris"}\'')
        made.add_argument("override", nargs="*", default=[], help="section.key=value")
        return made

    listing = command("list", "start every configured server and show its tools")
    listing.add_argument("--json", action="store_true", help="names, descriptions and whole schemas as JSON")
    command("check", "start every configured server: protocol, latency, schema hash, what is wrong and how to fix it")
    command("call", "call one tool and print what the model would read", one_tool=True)
    bench = command("bench", f"call one tool with {', '.join(map(str, LEVELS))} calls in flight", one_tool=True)
    bench.add_argument("--seconds", type=float, default=2.0, help="for each level (default %(default)s)")
    return parser


async def _list(setting: _Setting, *, as_json: bool) -> int:
    async with ToolPlane.open(setting.tools, variables=setting.variables) as plane:
        specs = plane.specs(["*"]) if configured_entries(setting.tools) else ()
    if as_json:
        rows = [
            {
                "name": s.name,
                "server": s.server,
                "tool": s.tool,
                "description": s.description,
                "parameters": s.parameters,
            }
            for s in specs
        ]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return 0
    table = Table("the model calls it", "server", "tool", "arguments", "description")
    for spec in specs:
        arguments = _signature(spec.parameters.get("properties"), spec.parameters.get("required"))
        table.add_row(spec.name, spec.server, spec.tool, arguments, spec.description)
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


async def _check(setting: _Setting) -> int:
    findings = await check_servers(setting.tools, {**os.environ, **setting.variables})
    table = Table("server", "transport", "protocol", "start ms", "list ms", "tools", "schema hash", "state")
    for found in findings:
        facts = found.facts
        row = [facts.protocol, f"{facts.start_s * 1e3:.0f}", f"{facts.list_s * 1e3:.1f}"] if facts else ["-", "-", "-"]
        state = f"[red]{found.problem}[/red]" if found.problem else "[green]ok[/green]"
        offers = [str(len(found.tools)), found.schema_hash if found.tools else "-"]
        table.add_row(found.server, found.transport, *row, *offers, state)
    Console().print(table)
    problems = [found.problem for found in findings if found.problem]
    if problems:
        raise UserError(problems[0] + (f" (and {len(problems) - 1} more, see above)" if problems[1:] else ""))
    check_roles(findings, setting.roles)
    return 0


async def _call(setting: _Setting, server: str, tool: str, arguments: dict[str, JsonValue]) -> int:
    async with ToolPlane.open(_only(setting.tools, server), variables=setting.variables) as plane:
        result = await plane.call(plane.name_of(server, tool), arguments)
    print(result.text)
    where = f"{result.server}__{result.tool}"
    print(f"{where}: {result.outcome}, {result.seconds * 1e3:.1f} ms, {result.result_bytes:,} bytes", file=sys.stderr)
    return 0 if result.outcome == "ok" else 1


async def _bench(setting: _Setting, server: str, tool: str, arguments: dict[str, JsonValue], seconds: float) -> int:
    tools = _only(setting.tools, server)
    tools = tools.model_copy(update={"mcpServers": {server: for_bench(tools.mcpServers[server])}})
    table = Table("in flight", "calls", "failed", "calls/s", "CPU ms a call", "p50 ms", "p99 ms")
    async with ToolPlane.open(tools, variables=setting.variables) as plane:
        name = plane.name_of(server, tool)
        first = await plane.call(name, arguments)
        if first.outcome != "ok":
            raise UserError(f"the tool does not answer, so there is nothing to measure: {first.text}")
        for level in LEVELS:
            m = await measure(plane, name, arguments, in_flight=level, seconds=seconds)
            figures = [f"{m.calls_per_s:,.0f}", f"{m.cpu_ms:.3f}", f"{m.p50_ms:.2f}", f"{m.p99_ms:.2f}"]
            table.add_row(str(level), f"{m.calls:,}", f"{m.failed:,}", *figures)
    Console().print(table)
    return 0


def _only(tools: Tools, server: str) -> Tools:
    """The same settings with one server. Raises `UserError`."""
    entries = configured_entries(tools)
    if server not in entries:
        raise UserError(f"no tool server is called {server!r}; configured: {', '.join(sorted(entries)) or 'none'}")
    return tools.model_copy(update={"mcpServers": {server: entries[server]}, "file": None})


def _arguments(text: str) -> dict[str, JsonValue]:
    try:
        arguments = json.loads(text)
    except ValueError as error:
        raise UserError(f"arguments {text!r} are not JSON ({error}); write them as '{{\"name\": value}}'") from error
    if not isinstance(arguments, dict):
        raise UserError(f"arguments {text!r} must be a JSON object, as '{{\"name\": value}}'")
    return arguments


def _setting(config: Path, overrides: Sequence[str], folder: Path) -> _Setting:
    if is_mcp_file(config):
        if overrides:
            raise UserError(
                f"override {overrides[0]!r} cannot change an MCP file; give a config that names it as tools.file"
            )
        return _Setting(Tools(file=config), {"PYTHON": sys.executable}, {})
    settings = load_config(config, overrides)
    return _Setting(settings.tools, tool_variables(settings, folder=folder), settings.episode.roles)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = _parser().parse_args(argv)
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    with tempfile.TemporaryDirectory(prefix="matpo-tools-") as folder:
        setting = _setting(options.config, options.override, Path(folder))
        match options.command:
            case "list":
                return asyncio.run(_list(setting, as_json=options.json))
            case "check":
                return asyncio.run(_check(setting))
            case "call":
                arguments = _arguments(options.arguments)
                return asyncio.run(_call(setting, options.server, options.tool, arguments))
            case _:
                arguments = _arguments(options.arguments)
                return asyncio.run(_bench(setting, options.server, options.tool, arguments, options.seconds))


if __name__ == "__main__":
    sys.exit(run_command(main))
