"""Logs and metrics on a disk that is full: lines are left out, and nothing else happens. `/dev/full` refuses writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from matpo.logs import configure_logs
from matpo.metrics import MetricsFile, read_metrics
from protocols.records import Record

FULL = Path("/dev/full")


class Figure(Record):
    value: int


@pytest.fixture
def own_logs() -> Iterator[None]:
    """Leave the configuration of other tests as it was."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)
    structlog.contextvars.clear_contextvars()


def test_a_log_line_that_does_not_fit_is_left_out(own_logs: None, tmp_path: Path) -> None:
    configure_logs(FULL, "here")
    structlog.get_logger().warning("lost")
    configure_logs(tmp_path / "log.jsonl", "here")
    structlog.get_logger().warning("kept")
    assert '"event": "kept"' in (tmp_path / "log.jsonl").read_text()


def test_a_figure_that_does_not_fit_is_left_out() -> None:
    metrics = MetricsFile(FULL)
    metrics.append("hub", Figure(value=1))
    metrics.close()


def test_a_line_that_a_full_disk_tore_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.append("hub", Figure(value=1))
    os.truncate(path, path.stat().st_size - 4)
    with path.open("ab") as file:
        file.write(b"\n")
    metrics.append("hub", Figure(value=2))
    metrics.close()
    lines = list(read_metrics(path))
    assert [line["value"] for _, line in lines] == [2]
    assert lines[-1][0] == path.stat().st_size
