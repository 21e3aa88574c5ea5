"""Variables and files of MCP server entries."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.tools.expand import configured_servers, expand
from matpo.config import Tools
from matpo.errors import UserError


def test_variables_defaults_and_cursor_spelling_are_filled_in() -> None:
    variables = {"KEY": "k1", "EMPTY": ""}
    assert expand("a ${KEY} ${env:KEY} ${NO:-fallback} ${EMPTY:-other} $KEY", variables, server="s") == (
        "a k1 k1 fallback other $KEY"
    )


def test_an_empty_default_and_a_set_but_empty_variable_are_allowed() -> None:
    assert expand("<${NO:-}><${EMPTY}>", {"EMPTY": ""}, server="s") == "<><>"


def test_an_unset_variable_is_an_error_that_names_server_and_variable() -> None:
    tools = Tools.model_validate({"mcpServers": {"web": {"url": "http://x", "headers": {"Authorization": "${TOKEN}"}}}})
    with pytest.raises(UserError, match=r"'web' uses \$\{TOKEN\}, which is not set; export TOKEN"):
        configured_servers(tools, {})


@pytest.mark.parametrize("odd", ["${input:key}", "${workspaceFolder}/x", "${}", "${A B}"])
def test_what_nothing_here_can_fill_in_is_an_error_and_never_a_literal(odd: str) -> None:
    with pytest.raises(UserError, match=r"'s' uses \$\{.*\}, which"):
        expand(odd, {}, server="s")


def test_a_disabled_server_needs_no_variables_and_does_not_exist() -> None:
    entries = {"off": {"command": "${NOT_SET}", "disabled": True}, "on": {"command": "x", "enabled": True}}
    assert list(configured_servers(Tools.model_validate({"mcpServers": entries}), {})) == ["on"]


def test_an_env_file_is_read_below_env(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("# keys\nA=1\nexport B = 'two words'\n\nC=\"x\"\n")
    entry = {"command": "x", "envFile": "${DIR}/.env", "env": {"A": "mine"}}
    tools = Tools.model_validate({"mcpServers": {"s": entry}})
    assert configured_servers(tools, {"DIR": str(tmp_path)})["s"].env == {"A": "mine", "B": "two words", "C": "x"}
    (tmp_path / ".env").write_text("A\n")
    with pytest.raises(UserError, match=r"'s': envFile .*: line 1 is not of the form KEY=VALUE"):
        configured_servers(tools, {"DIR": str(tmp_path)})
    with pytest.raises(UserError, match=r"'s': envFile 'nowhere/\.env' cannot be read"):
        configured_servers(tools, {"DIR": "nowhere"})


@pytest.mark.parametrize("key", ["mcpServers", "servers"])
def test_entries_of_a_file_are_read_beside_the_inline_ones(tmp_path: Path, key: str) -> None:
    file = tmp_path / "mcp.json"
    file.write_text(f'{{"{key}": {{"git": {{"command": "${{BIN}}/git-mcp", "args": ["--repo", "${{REPO:-.}}"]}}}}}}')
    tools = Tools.model_validate({"file": str(file), "mcpServers": {"web": {"url": "http://x"}}})
    servers = configured_servers(tools, {"BIN": "/opt"})
    assert sorted(servers) == ["git", "web"]
    assert (servers["git"].command, servers["git"].args) == ("/opt/git-mcp", ("--repo", "."))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "is not JSON"),
        ("[]", "has no `mcpServers` object"),
        ('{"mcpServers": {"a": {"command": "x", "url": "y"}}}', "server 'a'"),
        ('{"mcpServers": {"web": {"command": "x"}}}', "'web' is configured both inline and in"),
    ],
)
def test_a_bad_file_is_an_error_that_names_it(tmp_path: Path, content: str, problem: str) -> None:
    file = tmp_path / "mcp.json"
    file.write_text(content)
    tools = Tools.model_validate({"file": str(file), "mcpServers": {"web": {"url": "http://x"}}})
    with pytest.raises(UserError, match=problem):
        configured_servers(tools, {})


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mcp\.json' cannot be read"):
        configured_servers(Tools(file=tmp_path / "mcp.json"), {})
