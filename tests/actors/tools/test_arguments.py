"""Arguments are checked against a tool's schema, whatever the schema holds."""

from __future__ import annotations

from pydantic import JsonValue

from actors.tools.arguments import ArgumentCheck

CATASTROPHE = "^(a+)+$"
"""Takes 2^n steps to refuse n times a followed by b."""
BAIT = "a" * 60 + "b"


def said(schema: dict[str, JsonValue], arguments: dict[str, JsonValue]) -> str | None:
    return ArgumentCheck(schema).wrong("tool", arguments)


def test_a_wrong_argument_is_named_with_its_place() -> None:
    schema: dict[str, JsonValue] = {"properties": {"k": {"items": {"type": "integer"}}}, "additionalProperties": False}
    assert said(schema, {"k": [1, "x"]}) == "bad arguments for tool at ['k'][1]: 'x' is not of type 'integer'"
    assert said(schema, {"q": 1}) == (
        "bad arguments for tool: Additional properties are not allowed ('q' was unexpected)"
    )
    assert said(schema, {"k": [1]}) is None


def test_expressions_of_a_server_are_never_run_here() -> None:
    assert said({"properties": {"text": {"pattern": CATASTROPHE}}}, {"text": BAIT}) is None
    assert said({"propertyNames": {"pattern": CATASTROPHE}}, {BAIT: 1}) is None
    assert said({"patternProperties": {CATASTROPHE: {"type": "integer"}}}, {BAIT: 1}) is None
    assert said({"patternProperties": {CATASTROPHE: {}}, "additionalProperties": False}, {BAIT: 1}) is None
    hidden: dict[str, JsonValue] = {"allOf": [{"patternProperties": {CATASTROPHE: {}}}], "unevaluatedProperties": False}
    assert said(hidden, {BAIT: 1}) is None


def test_beside_an_expression_everything_else_is_still_checked() -> None:
    schema: dict[str, JsonValue] = {"properties": {"text": {"pattern": CATASTROPHE, "maxLength": 3}}, "required": ["k"]}
    assert said(schema, {"text": BAIT, "k": 1}) == f"bad arguments for tool at ['text']: {BAIT!r} is too long"
    assert said(schema, {"text": "a"}) == "bad arguments for tool: 'k' is a required property"
