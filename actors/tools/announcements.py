"""News of a server's tools. Before protocol 2026-07-28 they come unasked; since then one has to listen for them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
from mcp import MCPError
from mcp.client import ClientSession
from mcp.client.subscriptions import SubscriptionLost, listen
from mcp_types.version import MODERN_PROTOCOL_VERSIONS

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
ACKNOWLEDGED_WITHIN_S = 10.0


@asynccontextmanager
async def announcements(session: ClientSession, on_new_tools: Callable[[], None]) -> AsyncIterator[None]:
    """Call `on_new_tools` for the length of the block whenever the server says that its tools changed."""
    async with anyio.create_task_group() as tasks:
        if session.protocol_version in MODERN_PROTOCOL_VERSIONS and _announces(session):
            tasks.start_soon(_listen, session, on_new_tools, name="tool announcements")
        yield
        tasks.cancel_scope.cancel()


def _announces(session: ClientSession) -> bool:
    capabilities = session.server_capabilities
    return capabilities is not None and capabilities.tools is not None and bool(capabilities.tools.list_changed)


async def _listen(session: ClientSession, on_new_tools: Callable[[], None]) -> None:
    """Listen, and again after growing pauses when the stream ends; what was said in between is asked for."""
    pause_s, again = FIRST_PAUSE_S, False
    while True:
        try:
            with anyio.fail_after(ACKNOWLEDGED_WITHIN_S) as limit:
                async with listen(session, tools_list_changed=True) as news:
                    limit.deadline = float("inf")
                    pause_s = FIRST_PAUSE_S
                    if again:
                        on_new_tools()
                    async for _ in news:
                        on_new_tools()
        except (MCPError, SubscriptionLost, TimeoutError):
            # A connection that is gone is its owner's business; one that serves no listeners is asked ever less often.
            pass
        again = True
        await anyio.sleep(pause_s)
        pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
