"""An MCP server whose one tool answers after a heavy-tailed time: what live search feels like, without the network.

`python benchmarks/slow_server.py --median-s 0.8 --sigma 1.0 --seed 0`; the tool is `search(query, collection?)`.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator
from statistics import NormalDist

import anyio
from mcp.server import MCPServer

DECK = 128
"""Quantiles of the lognormal distribution that are dealt before the cards are shuffled again."""


def latencies(median_s: float, sigma: float, seed: int) -> Iterator[float]:
    """Lognormal seconds without end, from shuffled decks of quantiles: every run, and every part of one, gets the same
    share of slow calls (up to exp(2.66 sigma) medians), so that runs can be compared after a few hundred episodes.
    """
    shuffle = random.Random(seed).shuffle
    normal = NormalDist(0.0, sigma)
    while True:
        deck = [median_s * math.exp(normal.inv_cdf((card + 0.5) / DECK)) for card in range(DECK)]
        shuffle(deck)
        yield from deck


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--median-s", type=float, default=0.8)
    parser.add_argument("--sigma", type=float, default=1.0, help="of the logarithm of the time")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    seconds = latencies(options.median_s, options.sigma, options.seed)
    server = MCPServer("slow")

    @server.tool(structured_output=False)
    async def search(query: str, collection: str = "") -> str:
        """Search the documents."""
        await anyio.sleep(next(seconds))
        return "[1] nothing ."

    server.run()


if __name__ == "__main__":
    main()
