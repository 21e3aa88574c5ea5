"""What calls of tools came to, as actors write it into the run's metrics and the doctor reads it."""

from __future__ import annotations

from collections.abc import Iterable

from protocols.records import Record


class ToolFigures(Record):
    """What the calls of one tool came to since the actor started."""

    tool: str
    """As `server__tool`."""
    calls: int
    recorded: int
    """Answered from the record instead of the server."""
    model_errors: int
    infrastructure_errors: int
    result_bytes: int
    mean_ms: float
    p50_ms: float
    p99_ms: float


class ServerFigures(Record):
    """How the connections to one server fare."""

    server: str
    up: int
    """Copies that can be called now."""
    copies: int
    losses: int
    """Connections lost since the actor started."""


class ActorFigures(Record):
    """One line of the run's metrics: the tools of one actor."""

    actor_id: str
    tools: tuple[ToolFigures, ...]
    servers: tuple[ServerFigures, ...]


def together(actors: Iterable[ActorFigures]) -> tuple[ToolFigures, ...]:
    """The tools of several actors: counts added up, the mean over all calls, each quantile that of the worst actor."""
    found: dict[str, ToolFigures] = {}
    for figures in (figures for actor in actors for figures in actor.tools):
        other = found.get(figures.tool)
        found[figures.tool] = figures if other is None else _sum(other, figures)
    return tuple(found[tool] for tool in sorted(found))


def _sum(one: ToolFigures, other: ToolFigures) -> ToolFigures:
    calls = one.calls + other.calls
    return ToolFigures(
        tool=one.tool,
        calls=calls,
        recorded=one.recorded + other.recorded,
        model_errors=one.model_errors + other.model_errors,
        infrastructure_errors=one.infrastructure_errors + other.infrastructure_errors,
        result_bytes=one.result_bytes + other.result_bytes,
        mean_ms=round((one.mean_ms * one.calls + other.mean_ms * other.calls) / max(1, calls), 3),
        p50_ms=max(one.p50_ms, other.p50_ms),
        p99_ms=max(one.p99_ms, other.p99_ms),
    )
