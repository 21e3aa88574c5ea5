"""Which server a request goes to: its group's own, unless that one is busier than its share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import xxhash

SLACK: Final = 1.25
"""Times the average number of running requests: at most so many does a server have before groups spill over."""


def choose(group: str, running: Mapping[str, int]) -> str:
    """The name of one of the servers in `running` (name → requests under way).

    Every group ranks all servers by a hash of group and server (rendezvous hashing), so that its requests meet the
    prefixes they share, and so that a server that comes or goes moves no other server's groups. A server with its
    full share, `SLACK` times the average, is passed over (bounded loads, arXiv 1608.01350), so that none starves and
    a slow one, whose requests last, gets fewer. Without a group: the server with the fewest requests.
    """
    if not group:
        return min(running, key=lambda name: (running[name], name))
    limit = SLACK * (sum(running.values()) + 1) / len(running)
    ranked = sorted(running, key=lambda name: xxhash.xxh3_64_intdigest(f"{group}\0{name}".encode()), reverse=True)
    return next(name for name in ranked if running[name] < limit)
