"""Checks a call's arguments against the tool's schema before they are sent, so that the model learns what to fix.

Regular expressions of a schema are left to the server: one of somebody else's could keep this process busy for hours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import orjson
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError, best_match
from jsonschema.protocols import Validator
from jsonschema.validators import extend
from pydantic import JsonValue
from referencing import Registry
from referencing.exceptions import Unresolvable


def _left_to_the_server(*_: object) -> Iterator[ValidationError]:
    return iter(())


_WithoutPatterns: Final = extend(Draft202012Validator, {"pattern": _left_to_the_server})
_WithoutNames: Final = extend(
    _WithoutPatterns,
    dict.fromkeys(("patternProperties", "additionalProperties", "unevaluatedProperties"), _left_to_the_server),
)
"""Which properties are additional is undecided where some are described by expressions for their names."""


class ArgumentCheck:
    """The check of one tool."""

    def __init__(self, schema: Mapping[str, JsonValue]) -> None:
        kind = _WithoutNames if b'"patternProperties"' in orjson.dumps(schema) else _WithoutPatterns
        # An empty registry: a schema's remote references are never fetched.
        self._validator: Validator = kind(schema, registry=Registry())

    def wrong(self, tool: str, arguments: Mapping[str, JsonValue]) -> str | None:
        """What is wrong with the arguments, in words for the model; None when they may be sent."""
        try:
            orjson.dumps(arguments)
        except orjson.JSONEncodeError as error:
            return f"bad arguments for {tool}: they cannot be sent ({error}); write odd numbers as text"
        try:
            found = best_match(self._validator.iter_errors(arguments))
        except (Unresolvable, RecursionError):
            # The schema refers to something it does not contain; the server itself has to judge the arguments.
            return None
        if found is None:
            return None
        where = "".join(f"[{part!r}]" for part in found.absolute_path)
        return f"bad arguments for {tool}{f' at {where}' if where else ''}: {found.message[:300]}"
