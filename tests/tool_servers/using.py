"""Call a served tool as the server does."""

from __future__ import annotations

from tool_servers.serving import Arguments, Reply, ServedTool


async def use(tool: ServedTool, arguments: Arguments) -> Reply:
    """The tool's reply, awaited where it takes time."""
    reply = tool.call(arguments)
    return reply if isinstance(reply, Reply) else await reply
