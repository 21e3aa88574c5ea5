"""The client the MCP conformance suite drives: our tool plane, doing what the scenario asks for."""

from __future__ import annotations

import os
import sys

import anyio

from actors.tools.plane import ToolPlane
from matpo.config import McpServer, Tools


async def main(url: str, scenario: str) -> None:
    """Connect, list the tools and call the scenario's."""
    tools = Tools(mcpServers={"suite": McpServer(url=url)})
    async with ToolPlane.open(tools, variables={}) as plane:
        for spec in () if scenario == "initialize" else plane.specs(("suite__*",)):
            arguments = {"a": 5, "b": 3} if spec.tool == "add_numbers" else {}
            result = await plane.call(spec.name, arguments)
            sys.stderr.write(f"{scenario}: {spec.tool}: {result.outcome}: {result.text}\n")


if __name__ == "__main__":
    anyio.run(main, sys.argv[1], os.environ.get("MCP_CONFORMANCE_SCENARIO", ""))
