"""Model-facing tool names and the patterns of roles."""

from __future__ import annotations

import pytest

from actors.tools.names import matching, model_names
from matpo.config import ServerExtras
from matpo.errors import UserError

PLAIN = ServerExtras()


def test_a_tool_is_called_server_and_tool_unless_its_entry_says_otherwise() -> None:
    extras = {"wiki": PLAIN, "web": ServerExtras(bare_names=True, rename={"open.page": "read"})}
    assert model_names([("wiki", "search"), ("web", "search"), ("web", "open.page"), ("wiki", "a.b")], extras) == {
        "wiki__search": ("wiki", "search"),
        "search": ("web", "search"),
        "read": ("web", "open.page"),
        "wiki__a_b": ("wiki", "a.b"),
    }


@pytest.mark.parametrize(
    ("tools", "name"),
    [
        ([("a.b", "x"), ("a_b", "x")], "a_b__x"),
        ([("a", "b__x"), ("a__b", "x")], "a__b__x"),
        ([("bare", "x"), ("same", "x")], "x"),
    ],
)
def test_two_tools_with_the_same_model_facing_name_are_an_error(tools: list[tuple[str, str]], name: str) -> None:
    bare = ServerExtras(bare_names=True)
    extras = {server: bare if server in ("bare", "same") else PLAIN for server, _ in tools}
    with pytest.raises(UserError, match=f"would both be called '{name}'.*matpo.rename"):
        model_names(tools, extras)


def test_a_name_too_long_for_function_calling_is_an_error_that_renaming_mends() -> None:
    long = "x" * 62
    with pytest.raises(UserError, match=r"65 characters of at most 64; .*matpo\.rename"):
        model_names([("s", long)], {"s": PLAIN})
    assert list(model_names([("s", long)], {"s": ServerExtras(rename={long: "y"})})) == ["y"]


NAMES = {"wiki__search": ("wiki", "search"), "open": ("web", "open_page"), "web__search": ("web", "search")}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("wiki__search", ["wiki__search"]),
        ("open", ["open"]),
        ("open_page", ["open"]),
        ("web__open_page", ["open"]),
        ("web__*", ["open", "web__search"]),
        ("*", ["wiki__search", "open", "web__search"]),
    ],
)
def test_a_pattern_means_a_name_or_server_and_tool(pattern: str, expected: list[str]) -> None:
    assert matching(pattern, NAMES) == expected


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [("search", "may mean web__search or wiki__search"), ("sear*", r"no tool matches 'sear\*'; .* have: open, web__")],
)
def test_a_pattern_that_means_nothing_or_too_much_is_an_error(pattern: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        matching(pattern, NAMES)
