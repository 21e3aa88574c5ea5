"""docs/tools.md does what it says."""

from __future__ import annotations

import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
import structlog

from actors.tools.__main__ import main as tools_main
from actors.tools.plane import ToolPlane
from matpo.config import McpServer, ServerExtras, Tools
from matpo.errors import UserError
from tool_servers.code.__main__ import main as code_main
from tool_servers.scrape.__main__ import main as scrape_main
from tool_servers.search.__main__ import main as search_main

ROOT = Path(__file__).parents[3]
GUIDE = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


async def test_the_server_of_the_guide_plugs_in_as_the_guide_says(tmp_path: Path) -> None:
    (program,) = blocks("python")
    assert len([line for line in program.splitlines() if line.strip()]) <= 15
    entry, role, *_ = (tomllib.loads(block) for block in blocks("toml"))
    assert len(blocks("toml")[0].splitlines()) <= 5
    clock = tmp_path / "clock.py"
    await anyio.Path(clock).write_text(program)
    entry["tools"]["mcpServers"]["clock"]["args"] = [str(clock)]
    tools = Tools.model_validate(entry["tools"])
    with anyio.fail_after(40):
        async with ToolPlane.open(tools, variables={"PYTHON": sys.executable}) as plane:
            (spec,) = plane.specs([name for name in role["episode"]["roles"]["worker"]["tools"] if name != "search"])
            assert spec.description == "The time of day in a time zone such as Europe/Oslo."
            result = await plane.call("clock__now", {"zone": "Europe/Oslo"})
    assert (result.outcome, re.fullmatch(r"\d\d:\d\d", result.text) is not None) == ("ok", True)


def test_the_json_entry_is_accepted() -> None:
    (block,) = blocks("json")
    McpServer.model_validate(json.loads(block)["mcpServers"]["web"])


def test_the_table_has_every_extra_and_its_default() -> None:
    table = GUIDE.split("## Under `matpo`")[1].split("##")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", table, re.MULTILINE))
    written = {(): ("none", "all"), None: ("none",), False: ("false",)}
    for name, field in ServerExtras.model_fields.items():
        value = () if field.default == {} else field.default
        assert rows.pop(name).strip("`") in written.get(
            value, (f"{value:g}" if isinstance(value, float) else str(value),)
        )
    assert rows == {}


def test_the_options_of_the_shipped_servers_exist(capsys: pytest.CaptureFixture[str]) -> None:
    mains = {"search": search_main, "scrape": scrape_main, "code": code_main}
    for line in blocks("bash")[1].splitlines():
        _, _, module, command, *options = shlex.split(line)
        with pytest.raises(SystemExit) as stopped:
            mains[module.removeprefix("tool_servers.")]([command, "--help"])
        assert stopped.value.code == 0
        shown = capsys.readouterr().out
        assert all(option in shown for option in options if option.startswith("--"))


@pytest.fixture
def logs() -> Iterator[None]:
    """The command configures logging to the stderr of the moment; undo that."""
    yield
    structlog.reset_defaults()


@pytest.mark.usefixtures("logs")
def test_the_tools_commands_do_with_the_quick_starts_search_what_they_say(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    listing, calling, checking, benching = (shlex.split(line)[2:] for line in blocks("bash")[0].splitlines())
    assert tools_main(listing) == 0
    assert "query: string" in capsys.readouterr().out
    assert tools_main(calling) == 0
    said = capsys.readouterr()
    assert said.out.startswith("[1] ")
    assert "search__search: ok" in said.err
    assert tools_main(checking) == 0
    assert "stdio" in capsys.readouterr().out
    assert tools_main([*benching[:-1], "0.1"]) == 0
    assert "calls/s" in capsys.readouterr().out


@pytest.mark.usefixtures("logs")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["call", "configs/quickstart.toml", "search", "search", "{"], "arguments '{' are not JSON"),
        (["call", "configs/quickstart.toml", "search", "search", "[]"], "must be a JSON object"),
        (
            ["call", "configs/quickstart.toml", "serch", "search"],
            "no tool server is called 'serch'; configured: search",
        ),
        (["call", "configs/quickstart.toml", "search", "open"], "'search' has no tool 'open'; it offers: search"),
        (["list", "configs/quickstart.toml", 'tools.mcpServers.search.command="${NOPE}"'], r"uses \$\{NOPE\}"),
        (["list", "configs/quickstart.toml", 'tools.mcpServers.search.command="/no/program"'], "/no/program"),
    ],
)
def test_a_mistake_is_a_users_error(arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=words):
        tools_main(arguments)
