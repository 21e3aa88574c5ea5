"""Structured logs: JSON lines in the run's folder, readable lines on a terminal; no secret in either."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import structlog

from matpo.errors import NO_SPACE, UserError
from matpo.redaction import hide


class _LineFile:
    """Appends lines, and leaves out what a full disk does not take: a log must not end what it tells about."""

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise UserError(f"log {str(path)!r} cannot be written ({error.strerror}); give another folder") from error

    def msg(self, line: str) -> None:
        try:
            os.write(self._descriptor, line.encode() + b"\n")
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise

    debug = info = warning = error = critical = msg


def configure_logs(path: Path | None, component: str) -> None:
    """Send this process's log to `path` as JSON lines (or to stderr, for people, when it is None).

    Raises `UserError`.
    """
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
        lines = _LineFile(path)
        structlog.configure(
            processors=[*shared, _hiding(structlog.processors.JSONRenderer())],
            logger_factory=lambda *_: lines,
            wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        )
    structlog.contextvars.bind_contextvars(component=component)


def _hiding(render: structlog.typing.Processor) -> structlog.typing.Processor:
    """The same renderer, its secrets struck out."""

    def hidden(logger: structlog.typing.WrappedLogger, name: str, event: structlog.typing.EventDict) -> str:
        return hide(str(render(logger, name, event)))

    return hidden
