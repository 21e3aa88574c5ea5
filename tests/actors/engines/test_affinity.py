"""Groups keep to their servers as far as load allows."""

from __future__ import annotations

from collections import Counter

from actors.engines.sglang.affinity import choose

GROUPS = [f"group-{number}" for number in range(600)]


def test_a_group_goes_to_one_server_whatever_the_others_do() -> None:
    idle = choose("g", dict.fromkeys("abc", 0))
    assert choose("g", {"a": 3, "b": 3, "c": 3}) == choose("g", {"c": 1, "b": 1, "a": 1}) == idle


def test_groups_are_spread_over_all_servers() -> None:
    counts = Counter(choose(group, dict.fromkeys("abc", 0)) for group in GROUPS)
    assert all(150 < counts[name] < 250 for name in "abc")


def test_a_server_that_leaves_moves_only_its_own_groups() -> None:
    before = {group: choose(group, dict.fromkeys("abc", 0)) for group in GROUPS}
    after = {group: choose(group, dict.fromkeys("ab", 0)) for group in GROUPS}
    assert all(after[group] == before[group] for group in GROUPS if before[group] != "c")
    moved = Counter(after[group] for group in GROUPS if before[group] == "c")
    assert moved["a"] > 50 and moved["b"] > 50


def test_a_server_with_its_share_is_passed_over() -> None:
    # 16 requests and this one on 2 servers: a share is 1.25 · 17 / 2 = 10.6
    mine, other = ("a", "b") if choose("g", {"a": 0, "b": 0}) == "a" else ("b", "a")
    assert choose("g", {mine: 10, other: 6}) == mine
    assert choose("g", {mine: 11, other: 5}) == other


def test_a_burst_of_one_group_is_shared_out() -> None:
    running = dict.fromkeys("abc", 0)
    for _ in range(300):
        running[choose("g", running)] += 1
    assert sorted(running.values()) == [50, 125, 125]


def test_requests_without_a_group_go_where_there_are_fewest() -> None:
    assert choose("", {"a": 3, "b": 2, "c": 2}) == "b"
