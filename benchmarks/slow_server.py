"""An MCP server whose one tool answers after a heavy-tailed time: what live search feels like, without the network.

`python benchmarks/slow_server.py --median-s 0.3 --sigma 1.0 --seed 0`; the tool is `search(query, collection?)`.
"""

from __future__ import annotations

import argparse
import random

import anyio
from mcp.server import MCPServer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--median-s", type=float, default=0.3)
    parser.add_argument("--sigma", type=float, default=1.0, help="of the logarithm of the time")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    latency = random.Random(options.seed)
    server = MCPServer("slow")

    @server.tool(structured_output=False)
    async def search(query: str, collection: str = "") -> str:
        """Search the documents."""
        await anyio.sleep(options.median_s * latency.lognormvariate(0.0, options.sigma))
        return "[1] nothing ."

    server.run()


if __name__ == "__main__":
    main()
