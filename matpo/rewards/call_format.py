"""MATPO's format reward: which share of its calls did an agent write so that they could be run?"""

from __future__ import annotations

from collections.abc import Sequence

from protocols.records import ToolSpan


def format_score(calls: Sequence[ToolSpan]) -> float:
    """Share of calls that reached a tool or an agent; 1.0 for an agent that made none.

    A call that was refused (block unclosed, not JSON, unknown or forbidden tool, wrong arguments) has no server in its
    span. A tool's own error is not a format error. In MATPO's code an unclosed block scores 1.0; here it counts.
    """
    if not calls:
        return 1.0
    return sum(bool(call.server) for call in calls) / len(calls)
