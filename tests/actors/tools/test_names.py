"""Model-facing tool names and the patterns of roles."""

from __future__ import annotations

import pytest

from actors.tools.names import matches, model_names
from matpo.errors import UserError


def test_a_tool_keeps_its_bare_name_unless_another_server_has_it_too() -> None:
    assert model_names([("wiki", "search"), ("web", "search"), ("web", "open.page")]) == {
        "wiki__search": ("wiki", "search"),
        "web__search": ("web", "search"),
        "open_page": ("web", "open.page"),
    }


def test_two_tools_with_the_same_model_facing_name_are_an_error() -> None:
    with pytest.raises(UserError, match="would both be called 'a_b__x'"):
        model_names([("a.b", "x"), ("a_b", "x")])


def test_a_name_too_long_for_function_calling_is_an_error() -> None:
    with pytest.raises(UserError, match="65 characters of at most 64"):
        model_names([("s", "x" * 65)])


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("search", True), ("wiki__search", True), ("wiki__*", True), ("*", True), ("web__*", False), ("sear*", False)],
)
def test_a_pattern_means_a_name_or_server_and_tool(pattern: str, expected: bool) -> None:
    assert matches(pattern, name="search", server="wiki", tool="search") is expected
