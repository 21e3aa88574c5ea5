"""Settings of the MCP servers: the usual `mcpServers` object, with our extras under one key per server."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from matpo.section import Section


class ServerExtras(Section):
    """What matpo adds to an MCP server entry."""

    timeout_s: float = Field(default=30.0, gt=0)
    max_inflight: int = Field(default=64, ge=1)
    max_result_bytes: int = Field(default=200_000, ge=1)
    start_timeout_s: float = Field(default=30.0, gt=0)
    idempotent: tuple[str, ...] = ()
    """Tools that may be called again after an infrastructure failure."""
    retries: int = Field(default=2, ge=0)
    """For idempotent tools."""
    allow: tuple[str, ...] = ()
    """Only these tools; empty allows all."""
    deny: tuple[str, ...] = ()


class McpServer(Section):
    """One entry of the usual `mcpServers` object, with our extras under `matpo`."""

    command: str | None = None
    args: tuple[str, ...] = ()
    env: dict[str, str] = Field(default={})
    cwd: str | None = None
    url: str | None = None
    headers: dict[str, str] = Field(default={})
    type: Literal["stdio", "http", "streamable-http", "streamableHttp"] | None = None
    matpo: ServerExtras = ServerExtras()

    @model_validator(mode="after")
    def _one_way_in(self) -> McpServer:
        if (self.command is None) == (self.url is None):
            raise ValueError("an MCP server needs either `command` (stdio) or `url` (HTTP), and not both")
        return self


class Tools(Section):
    """The MCP servers the actors start or connect to."""

    mcpServers: dict[str, McpServer] = Field(default={})
    """Inline entries, as in Claude Desktop, Claude Code or Cursor files. `${VAR}` and `${VAR:-default}` expand."""
    file: Path | None = None
    """A JSON file with the same object, read beside the inline entries."""
