"""Reads tool calls out of a model's message, in either format, and says what is wrong with those that cannot be run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import orjson
from pydantic import JsonValue

AGENT_SERVER = "agent"
"""Server name of a delegation: the callee is another role, not an MCP tool."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Something a role may call: a tool of an MCP server, or another role."""

    name: str
    """As the model writes it."""
    server: str
    tool: str
    """Its bare name on the server."""
    description: str
    parameters: Mapping[str, JsonValue]
    """JSON schema of the arguments object."""


@dataclass(frozen=True, slots=True)
class Call:
    """A block that could be read."""

    name: str
    server: str | None
    """Given in the XML form only."""
    arguments: dict[str, JsonValue]


@dataclass(frozen=True, slots=True)
class BadCall:
    """A block that could not, and what the model should do about it."""

    reason: str


Block = Call | BadCall


class CallFormat(Protocol):
    """One way of writing tool calls into a message."""

    def parse(self, text: str) -> tuple[Block, ...]:
        """Every call of a message outside its thinking, in order; empty for a final message."""
        ...

    def strip(self, text: str) -> str:
        """The message without thinking and without tool blocks, closed or not."""
        ...

    def describe(self, offers: Sequence[Offer]) -> str:
        """What a system prompt says about the tools and how to call them; the same text for the same offers."""
        ...


def without_thinking(text: str) -> str:
    """What follows the last `</think>`; an unclosed `<think>` hides the rest of the message."""
    text = text[text.rfind("</think>") + len("</think>") :] if "</think>" in text else text
    opened = text.find("<think>")
    return text if opened < 0 else text[:opened]


class JsonCalls:
    """Hermes/Qwen: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`."""

    def parse(self, text: str) -> tuple[Block, ...]:
        return tuple(_parse(text, "tool_call", _read_json))

    def strip(self, text: str) -> str:
        return _strip(text, "tool_call")

    def describe(self, offers: Sequence[Offer]) -> str:
        if not offers:
            return ""
        lines = [_compact({"type": "function", "function": function_schema(offer)}) for offer in offers]
        return "\n".join(
            [
                "# Tools",
                "",
                "You may call one or more functions. Their signatures are within <tools></tools>:",
                "<tools>",
                *lines,
                "</tools>",
                "",
                "For each call write a JSON object with the function's name and arguments within tool_call tags:",
                "<tool_call>",
                '{"name": <function-name>, "arguments": <arguments-object>}',
                "</tool_call>",
            ]
        )


class XmlCalls:
    """MATPO: `<use_mcp_tool>` with `<server_name>`, `<tool_name>` and `<arguments>` holding a JSON object."""

    def parse(self, text: str) -> tuple[Block, ...]:
        return tuple(_parse(text, "use_mcp_tool", _read_xml))

    def strip(self, text: str) -> str:
        return _strip(text, "use_mcp_tool")

    def describe(self, offers: Sequence[Offer]) -> str:
        if not offers:
            return ""
        lines = [
            "You can use the tools listed below. Call one by writing a block of this form at the end of your message:",
            "",
            "<use_mcp_tool>",
            "<server_name>server name here</server_name>",
            "<tool_name>tool name here</tool_name>",
            "<arguments>",
            '{"parameter": "value"}',
            "</arguments>",
            "</use_mcp_tool>",
        ]
        for server in dict.fromkeys(offer.server for offer in offers):
            lines += ["", f"## Server name: {server}"]
            for offer in (o for o in offers if o.server == server):
                schema = _compact(dict(offer.parameters))
                lines += [f"### Tool name: {offer.name}", f"Description: {offer.description}"]
                lines += [f"Input JSON schema: {schema}"]
        return "\n".join(lines)


FORMATS: Mapping[Literal["json", "xml"], CallFormat] = {"json": JsonCalls(), "xml": XmlCalls()}


def function_schema(offer: Offer) -> dict[str, JsonValue]:
    """The offer as chat templates want it in `tools=[{"type": "function", "function": …}]`."""
    return {"name": offer.name, "description": offer.description, "parameters": dict(offer.parameters)}


def fault(call: Call, offers: Mapping[str, Offer]) -> str | None:
    """Why a well-formed call cannot be run by someone with these offers, in words the model can act on; None if it can.

    Checks name, server, required and unexpected arguments, and the plain JSON types; the server checks the rest.
    """
    offer = offers.get(call.name)
    if offer is None:
        return f"you have no tool {call.name!r}; {_choices(offers)}"
    if call.server is not None and call.server != offer.server:
        return f"tool {call.name!r} is on the server {offer.server!r}, not {call.server!r}"
    properties = offer.parameters.get("properties")
    known: Mapping[str, JsonValue] = properties if isinstance(properties, dict) else {}
    required = offer.parameters.get("required")
    missing = [n for n in (required if isinstance(required, list) else []) if n not in call.arguments]
    if missing:
        return f"tool {call.name!r} needs the argument {missing[0]!r}; it takes {_names(known)}"
    unexpected = sorted(set(call.arguments) - set(known))
    if unexpected and offer.parameters.get("additionalProperties") is not True:
        return f"tool {call.name!r} has no argument {unexpected[0]!r}; it takes {_names(known)}"
    for name, value in call.arguments.items():
        wanted = _wanted_type(known.get(name))
        if wanted is not None and not _is_a(value, wanted):
            return f"argument {name!r} of tool {call.name!r} must be of type {wanted}, not {_compact(value)[:40]}"
    return None


_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
}


def _wanted_type(schema: JsonValue) -> str | None:
    kind = schema.get("type") if isinstance(schema, dict) else None
    return kind if isinstance(kind, str) and kind in _TYPES else None


def _is_a(value: JsonValue, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, _TYPES[kind])


def _choices(offers: Mapping[str, Offer]) -> str:
    return f"you may call {_names(offers)}" if offers else "you have no tools; answer directly"


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _compact(value: JsonValue) -> str:
    return json.dumps(value, ensure_ascii=False)


class _Reader(Protocol):
    def __call__(self, body: str, /) -> Block: ...


def _parse(text: str, tag: str, read: _Reader) -> Iterator[Block]:
    """Blocks between `<tag>` and `</tag>`; one opened again before it was closed counts as unclosed."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    if opening not in text and closing not in text:
        return
    text = without_thinking(text)
    at, closed = 0, 0
    while (start := text.find(opening, at)) >= 0:
        at = start + len(opening)
        end, following = text.find(closing, at), text.find(opening, at)
        if end < 0 or 0 <= following < end:
            yield BadCall(f"your {opening} block is not closed; end it with {closing}")
        else:
            closed += 1
            yield read(text[at:end])
            at = end + len(closing)
    if text.count(closing) > closed:
        yield BadCall(f"{closing} without {opening} before it; write the whole block")


def _strip(text: str, tag: str) -> str:
    text = without_thinking(text)
    if f"<{tag}>" in text:
        text = re.sub(rf"<{tag}>(?:(?!<{tag}>).)*?</{tag}>", "", text, flags=re.DOTALL)
        text = text.split(f"<{tag}>", 1)[0]
    return text.replace(f"</{tag}>", "").strip()


def _read_json(body: str) -> Block:
    try:
        value: JsonValue = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        return BadCall(f'the tool call is not valid JSON ({error.msg}); write {{"name": …, "arguments": {{…}}}}')
    if (
        not isinstance(value, dict)
        or not isinstance(value.get("name"), str)
        or set(value) - {"name", "arguments", "id"}
    ):
        return BadCall('a tool call is a JSON object with "name" (a string) and "arguments" (an object)')
    arguments = value.get("arguments", {})
    if not isinstance(arguments, dict):
        return BadCall('"arguments" of a tool call must be a JSON object, not a string or list')
    return Call(name=str(value["name"]), server=None, arguments=arguments)


_INNER = {name: re.compile(rf"<{name}>(.*?)</{name}>", re.DOTALL) for name in ("server_name", "tool_name", "arguments")}


def _read_xml(body: str) -> Block:
    found = {name: pattern.search(body) for name, pattern in _INNER.items()}
    server, tool, raw = found["server_name"], found["tool_name"], found["arguments"]
    if server is None or tool is None or raw is None:
        missing = next(name for name, match in found.items() if match is None)
        return BadCall(f"the tool block has no <{missing}>…</{missing}>")
    try:
        arguments: JsonValue = orjson.loads(raw.group(1).strip() or "{}")
    except orjson.JSONDecodeError as error:
        return BadCall(f"<arguments> is not valid JSON ({error.msg}); write one JSON object")
    if not isinstance(arguments, dict):
        return BadCall("<arguments> must hold one JSON object")
    return Call(name=tool.group(1).strip(), server=server.group(1).strip(), arguments=arguments)
