"""The list of waits: each named, limited and with a remedy; a stall is said once."""

from __future__ import annotations

import string
from typing import get_args

import pytest
from structlog.testing import capture_logs

from matpo.waits import WAITS, WaitBook, WaitName, log_stalls, waiting

FROZEN: tuple[WaitName, ...] = (
    "actor", "trainer", "hub", "hub_answer", "hub_status", "engine", "engine_server", "tool_server",
    "tool_server_start",
)  # fmt: skip
SLOWEST_LOOK_S = 20.0
"""Noticing takes up to ten seconds, and every process looks at least every ten."""


def test_every_name_is_listed_with_a_limit_and_a_remedy() -> None:
    assert set(WAITS) == set(get_args(WaitName))
    for named in WAITS.values():
        assert named.limit_s > 0
        assert named.what
        assert named.remedy


@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_process_is_a_stall_within_a_minute(name: WaitName) -> None:
    assert WAITS[name].limit_s + SLOWEST_LOOK_S <= 60.0


def test_what_is_waited_for_is_the_same_however_its_details_change() -> None:
    """A wait is known by its `what`: only what is different for another wait may be in it."""
    fixed = {"step", "actor", "version", "server", "folder"}
    for named in WAITS.values():
        assert {field for _, field, _, _ in string.Formatter().parse(named.what) if field} <= fixed


def test_a_stall_is_reported_once_until_it_ends() -> None:
    book, condition = WaitBook("hub"), waiting("actors")
    assert book.new_stalls(book.update([condition], 0.0)) == []
    (stall,) = book.new_stalls(book.update([condition], 61.0))
    assert (stall.who, stall.since_s, stall.limit_s) == ("hub", 61.0, 60.0)
    assert book.new_stalls(book.update([condition], 62.0)) == []
    assert book.new_stalls(book.update([], 63.0)) == []
    assert book.update([condition], 64.0)[0].since_s == 0.0
    assert len(book.new_stalls(book.update([condition], 125.0))) == 1


def test_a_wait_may_know_since_when_it_lasts() -> None:
    (wait,) = WaitBook("hub").update([waiting("actor", since_s=3.0, actor="actor-1")], 10.0)
    assert (wait.what, wait.since_s) == ("a heartbeat of actor-1", 7.0)


def test_the_log_says_who_waits_on_whom_since_when_and_what_helps() -> None:
    book = WaitBook("actor-0")
    with capture_logs() as lines:
        for now_s in (0.0, 25.0, 26.0):
            log_stalls(book, book.update([waiting("hub", since_s=0.0)], now_s))
    (line,) = lines
    assert (line["event"], line["name"], line["who"], line["since_s"]) == ("stall", "hub", "actor-0", 25.0)
    assert line["waits_for"] == "a sign of life of the hub"
    assert "logs/hub.jsonl" in line["remedy"]
