"""Structured logs: JSON lines in the run's folder, readable lines on a terminal; no secret in either."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import structlog

from matpo.redaction import hide


def configure_logs(path: Path | None, component: str) -> None:
    """Send this process's log to `path` as JSON lines (or to stderr, for people, when it is None)."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    if path is None:
        structlog.configure(
            processors=[*shared, _hiding(structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()))],
            logger_factory=structlog.PrintLoggerFactory(sys.stderr),
            wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        )
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        structlog.configure(
            processors=[*shared, _hiding(structlog.processors.JSONRenderer())],
            logger_factory=structlog.WriteLoggerFactory(path.open("a", buffering=1, encoding="utf-8")),
            wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        )
    structlog.contextvars.bind_contextvars(component=component)


def _hiding(render: structlog.typing.Processor) -> structlog.typing.Processor:
    """The same renderer, its secrets struck out."""

    def hidden(logger: structlog.typing.WrappedLogger, name: str, event: structlog.typing.EventDict) -> str:
        return hide(str(render(logger, name, event)))

    return hidden
