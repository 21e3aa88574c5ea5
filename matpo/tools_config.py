"""Settings of the MCP servers: the usual `mcpServers` object, with our extras under one key per server."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, JsonValue, model_validator

from matpo import redaction
from matpo.redaction import Secret, SecretArguments, SecretUrl
from matpo.section import Section

MEANINGLESS_KEYS = frozenset(
    {"alwaysAllow", "autoApprove", "description", "dev", "displayName", "gallery", "icon", "iconPath", "icons", "id",
     "keep_alive", "metadata", "name", "note", "notes", "tags", "timeout", "title", "trust", "version"}
)  # fmt: skip
"""Keys that editors and desktop apps write into an entry and that mean nothing here (`timeout` has no agreed unit)."""
OTHER_SPELLINGS = {
    "httpUrl": "url", "serverUrl": "url", "transport": "type", "transportType": "type",
    "workingDirectory": "cwd", "env_file": "envFile",
    "includeTools": "matpo.allow", "enabled_tools": "matpo.allow", "enabledTools": "matpo.allow",
    "excludeTools": "matpo.deny", "disabled_tools": "matpo.deny", "disabledTools": "matpo.deny",
}  # fmt: skip
"""Keys of some apps that mean the same as one of ours."""

Transport = Literal["stdio", "http", "sse"]


class ServerExtras(Section):
    """What matpo adds to an MCP server entry."""

    scope: Literal["shared", "episode"] = "shared"
    """`episode`: every episode has a server (over HTTP: a connection) of its own, from its first call to its end."""
    replicas: int = Field(default=1, ge=1)
    """Copies of a shared server; each call goes to the one with the fewest under way."""
    max_episodes: int = Field(default=64, ge=1)
    """Most servers of scope `episode` at a time, in each actor."""
    timeout_s: float = Field(default=30.0, gt=0)
    """For one attempt at a call: waiting for a free place, for a restart and for the answer."""
    max_inflight: int = Field(default=64, ge=1)
    """Calls at a time, for each copy of the server."""
    max_result_bytes: int = Field(default=200_000, ge=1)
    start_timeout_s: float = Field(default=30.0, gt=0)
    idempotent: tuple[str, ...] = ()
    """Tools that may be called again after an infrastructure failure; `*` means all."""
    retries: int = Field(default=2, ge=0)
    """For idempotent tools."""
    cache: Literal["off", "record", "replay"] = "off"
    """`record`: a call is made once, later ones read its result. `replay`: no server, recorded results only."""
    allow: tuple[str, ...] = ()
    """Only these tools; empty allows all."""
    deny: tuple[str, ...] = ()
    bare_names: bool = False
    """The model calls these tools by their own names instead of `server__tool`."""
    rename: dict[str, str] = Field(default={})
    """Tool → the whole name that the model calls it by."""
    pin: str | None = Field(default=None, pattern="^[0-9a-f]{16}$")
    """Schema hash that the server's tools must have; `matpo tools check` shows it."""

    @model_validator(mode="after")
    def _no_idle_options(self) -> ServerExtras:
        idle = {name for name, field in ServerExtras.model_fields.items() if dict(self)[name] == field.default}
        if "retries" not in idle and not self.idempotent:
            raise ValueError("retries apply to idempotent tools only; name some under `idempotent`")
        if self.scope == "shared" and "max_episodes" not in idle:
            raise ValueError("max_episodes has no effect on a shared server; set scope = 'episode' or leave it out")
        if self.scope == "episode" and self.replicas > 1:
            raise ValueError("replicas are copies of a shared server; with scope = 'episode' set max_episodes")
        if self.scope == "episode" and self.cache != "off":
            raise ValueError("results of a server per episode depend on its episode; cache goes with scope = 'shared'")
        return self


class McpServer(Section):
    """One entry of the usual `mcpServers` object, with our extras under `matpo`."""

    command: str | None = None
    args: SecretArguments = ()
    env: dict[str, Secret] = Field(default={}, repr=False)
    envFile: str | None = None
    """More environment variables, one KEY=VALUE a line; `env` wins."""
    cwd: str | None = None
    url: SecretUrl = None
    headers: dict[str, Secret] = Field(default={}, repr=False)
    type: Literal["stdio", "http", "streamable-http", "streamableHttp", "sse"] | None = None
    disabled: bool = False
    """The server is not started and its tools do not exist."""
    matpo: ServerExtras = ServerExtras()

    @model_validator(mode="before")
    @classmethod
    def _other_apps_keys(cls, entry: JsonValue) -> JsonValue:
        return _in_our_words(entry) if isinstance(entry, dict) else entry

    @model_validator(mode="after")
    def _one_way_in(self) -> McpServer:
        if (self.command is None) == (self.url is None):
            raise ValueError("an MCP server needs either `command` (stdio) or `url` (HTTP), and not both")
        if self.type is not None and (self.type == "stdio") == (self.command is None):
            raise ValueError(f"type {self.type!r} does not fit: `stdio` goes with `command`, the others with `url`")
        here = ("args", "env", "envFile", "cwd") if self.command is None else ("headers",)
        for key in here:
            if key in self.model_fields_set and dict(self)[key]:
                raise ValueError(f"`{key}` has no effect on a server with a `{'url' if self.url else 'command'}`")
        return self

    def conceal(self) -> None:
        """Have no text of this process show what may be secret here."""
        for name, value in (*self.env.items(), *self.headers.items()):
            redaction.conceal(name, value)
        redaction.conceal_arguments(self.args)
        redaction.conceal_url(self.url or "")

    def hidden(self) -> dict[str, JsonValue]:
        """What the JSON form does not show, in full."""
        seen = self.model_dump(mode="json")
        full: dict[str, JsonValue] = {
            "args": list(self.args), "env": {**self.env}, "headers": {**self.headers}, "url": self.url
        }  # fmt: skip
        return {key: value for key, value in full.items() if seen[key] != value}

    @property
    def transport(self) -> Transport:
        """How the server is spoken to. Without a `type`, a url whose path ends in `/sse` means the older SSE form."""
        if self.url is None:
            return "stdio"
        if self.type == "sse" or (self.type is None and self.url.partition("?")[0].rstrip("/").endswith("/sse")):
            return "sse"
        return "http"


def _in_our_words(entry: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """An entry written for another app: its spellings made ours, what means nothing here left out."""
    ours: dict[str, JsonValue] = {}
    extras: dict[str, JsonValue] = {}
    for key, value in entry.items():
        if key in MEANINGLESS_KEYS:
            continue
        if key == "enabled" and isinstance(value, bool):
            ours["disabled"] = not value
        elif key in OTHER_SPELLINGS and OTHER_SPELLINGS[key].startswith("matpo."):
            extras[OTHER_SPELLINGS[key].removeprefix("matpo.")] = value
        else:
            ours[OTHER_SPELLINGS.get(key, key)] = value
    for key in ours:
        if key in ServerExtras.model_fields:
            raise ValueError(f"`{key}` is ours, not MCP's: write it as `matpo.{key}`")
    if extras:
        given = ours.get("matpo", {})
        ours["matpo"] = {**extras, **given} if isinstance(given, dict) else given
    return ours


class Tools(Section):
    """The MCP servers the actors start or connect to."""

    mcpServers: dict[str, McpServer] = Field(default={})
    """Inline entries, as in Claude Desktop, Claude Code or Cursor files. `${VAR}` and `${VAR:-default}` expand."""
    file: Path | None = None
    """A JSON file with the same object, read beside the inline entries."""
    cache_file: Path = Path("tool_calls.sqlite")
    """Where servers with `cache` record their calls, and replay them from."""
