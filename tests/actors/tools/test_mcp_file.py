"""MCP files as other apps write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.tools.expand import configured_servers
from actors.tools.mcp_file import is_mcp_file, read_mcp_file
from matpo.config import McpServer, Tools
from matpo.errors import UserError

VS_CODE = """{
  // keys are asked for once
  "inputs": [
    {"type": "promptString", "id": "github-token", "description": "GitHub", "password": true},
    {"type": "promptString", "id": "region", "description": "Where", "default": "eu"},
  ],
  "servers": {
    "github": {
      "type": "http", "url": "https://x.example/mcp//a", "headers": {"Authorization": "Bearer ${input:github-token}"},
    },
    "local": {
      "type": "stdio", "command": "srv", /* ours */ "args": ["${workspaceFolder}/data", "${input:region}"],
      "envFile": "${workspaceFolder}/.env", "dev": {"watch": "src/**"}, "gallery": true,
    },
  },
}"""
CLINE = """{"mcpServers": {"a": {"command": "x", "disabled": false, "autoApprove": ["t"], "timeout": 60},
                           "b": {"command": "y", "alwaysAllow": [], "disabled": true}}}"""
GEMINI = """{"mcpServers": {"a": {"httpUrl": "http://h/mcp", "trust": true, "timeout": 600000, "includeTools": ["t"]},
                            "b": {"command": "x", "excludeTools": ["u"], "description": "d"}}}"""
FASTMCP = """{"mcpServers": {"a": {"transport": "sse", "url": "http://h/events", "icon": "i", "tags": []},
                             "b": {"transport": "stdio", "command": "x", "keep_alive": true}}}"""
CURSOR = """{"mcpServers": {"a": {"command": "npx", "args": ["-y", "srv"], "env": {"K": "${env:KEY}"}, "name": "A"}}}"""


def write(folder: Path, text: str, name: str = "mcp.json") -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def test_a_file_of_vs_code_works_as_it_is(tmp_path: Path) -> None:
    file = write(tmp_path, VS_CODE, ".vscode/mcp.json")
    write(tmp_path, "REGION=us", ".env")
    variables = {"GITHUB_TOKEN": "g"}
    servers = configured_servers(Tools(file=file), variables)
    assert (servers["github"].url, servers["github"].transport) == ("https://x.example/mcp//a", "http")
    assert servers["github"].headers == {"Authorization": "Bearer g"}
    assert servers["local"].args == (f"{tmp_path}/data", "eu")
    assert servers["local"].env == {"REGION": "us"}


def test_an_input_without_a_value_is_an_error_that_names_server_and_variable(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'github' uses \$\{GITHUB_TOKEN\}, which is not set; export GITHUB_TOKEN"):
        configured_servers(Tools(file=write(tmp_path, VS_CODE)), {})


def test_files_of_other_apps_work_as_they_are(tmp_path: Path) -> None:
    cline, gemini, fastmcp, cursor = (read_mcp_file(write(tmp_path, text)) for text in (CLINE, GEMINI, FASTMCP, CURSOR))
    assert [(name, entry.disabled) for name, entry in cline.items()] == [("a", False), ("b", True)]
    assert (gemini["a"].url, gemini["a"].transport, gemini["a"].matpo.allow) == ("http://h/mcp", "http", ("t",))
    assert gemini["b"].matpo.deny == ("u",)
    assert [entry.transport for entry in fastmcp.values()] == ["sse", "stdio"]
    assert cursor["a"].env == {"K": "${env:KEY}"}


@pytest.mark.parametrize(
    ("entry", "transport"),
    [
        ({"command": "x"}, "stdio"),
        ({"command": "x", "type": "stdio"}, "stdio"),
        ({"url": "http://h/mcp"}, "http"),
        ({"url": "http://h/mcp", "type": "streamable-http"}, "http"),
        ({"url": "http://h/mcp", "type": "streamableHttp"}, "http"),
        ({"url": "http://h/mcp", "type": "sse"}, "sse"),
        ({"url": "http://h/sse?key=1"}, "sse"),
        ({"url": "http://h/sse", "type": "http"}, "http"),
    ],
)
def test_every_spelling_of_a_transport_is_understood(entry: dict[str, str], transport: str) -> None:
    assert McpServer.model_validate(entry).transport == transport


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (
            '{"command": "x", "timeout_s": 5}',
            "server 'a': `timeout_s` is ours, not MCP's: write it as `matpo.timeout_s`",
        ),
        ('{"command": "x", "arg": []}', "server 'a': unknown option arg = .*did you mean 'args'"),
        ('{"command": "x", "oauth": {}}', "unknown option oauth"),
        ('{"command": "x", "type": "http"}', "type 'http' does not fit"),
        ('{"url": "http://h", "args": ["x"]}', "`args` has no effect on a server with a `url`"),
        ('{"command": "x", "headers": {"a": "b"}}', "`headers` has no effect on a server with a `command`"),
        ('{"command": "x", "type": "websocket"}', "type = 'websocket': must be 'stdio', 'http'"),
        ('{"command": "x", "matpo": {"timeout": 5}}', "unknown option matpo.timeout = 5; did you mean 'timeout_s'"),
        ('{"command": "x", "matpo": {"retries": 5}}', "retries apply to idempotent tools only"),
        ('{"command": "x", "matpo": {"max_episodes": 5}}', "max_episodes has no effect on a shared server"),
        ('{"command": "x", "matpo": {"scope": "episode", "replicas": 2}}', "replicas are copies of a shared server"),
        ('{"command": "x", "matpo": {"scope": "episode", "cache": "record"}}', "cache goes with scope = 'shared'"),
        ('"x"', "server 'a': must be a section of names and values"),
        ('{"command": "x", "env": {"API_KEY": 12345678}}', "env.API_KEY = <hidden>: must be a valid string"),
        ('{"command": "x", "enviroment": {"API_KEY": "planted"}}', "option enviroment = <hidden>; known here: args"),
        ('{"command": "x", "headers": "Bearer planted"}', "headers = <hidden>: must be a section of names and"),
    ],
)
def test_a_bad_entry_is_an_error_that_names_file_server_and_key(tmp_path: Path, entry: str, problem: str) -> None:
    file = write(tmp_path, f'{{"mcpServers": {{"a": {entry}}}}}')
    with pytest.raises(UserError, match=problem) as caught:
        read_mcp_file(file)
    assert str(file) in str(caught.value)


def test_an_mcp_file_is_told_from_a_resolved_config(tmp_path: Path) -> None:
    assert is_mcp_file(write(tmp_path, CURSOR))
    assert is_mcp_file(write(tmp_path, VS_CODE))
    assert not is_mcp_file(write(tmp_path, '{"tools": {"mcpServers": {}}}'))
    assert not is_mcp_file(write(tmp_path, "{"))
    assert not is_mcp_file(tmp_path / "config.toml")
