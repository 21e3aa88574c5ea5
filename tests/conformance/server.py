"""What the MCP conformance suite meets: the tools it asks for, served as our three servers serve theirs."""

from __future__ import annotations

import sys

from tool_servers.serving import Arguments, BadCall, Reply, ServedTool, Service, serve


def simple_text(_arguments: Arguments) -> Reply:
    """Always the same words."""
    return Reply("This is a simple text response for testing.")


def always_wrong(_arguments: Arguments) -> Reply:
    """Always an error of the caller's."""
    raise BadCall("This tool intentionally returns an error for testing")


SERVICE = Service(
    "conformance",
    "Tools of the MCP conformance suite.",
    (
        ServedTool("test_simple_text", "Tests simple text", {"type": "object", "properties": {}}, simple_text),
        ServedTool("test_error_handling", "Tests errors", {"type": "object", "properties": {}}, always_wrong),
    ),
)

if __name__ == "__main__":
    sys.exit(serve(SERVICE, http=0, host="127.0.0.1"))
