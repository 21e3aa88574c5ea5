"""Secrets stay where they belong: not in a run's config, not in what anybody can read."""

from __future__ import annotations

import io
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from pydantic import JsonValue

from matpo import redaction
from matpo.config import Config
from matpo.errors import UserError, run_command
from matpo.folder import RunFolder
from matpo.load import load_config
from matpo.logs import configure_logs
from matpo.metrics import MetricsFile
from matpo.redaction import conceal, hide, hide_from_model, shown, shown_arguments, shown_url
from protocols.records import Record

ROOT = Path(__file__).resolve().parents[2]
ENTRY: dict[str, JsonValue] = {
    "command": "server",
    "args": ["--api-key", "argument-planted-1", "--corpus", "docs.jsonl", "--token=argument-planted-2"],
    "env": {"API_KEY": "environment-planted-3", "MODE": "fast", "OTHER": "${OTHER_KEY}"},
}
REMOTE: dict[str, JsonValue] = {
    "url": "https://me:password-planted-4@host.example/mcp?key=query-planted-5&n=${N}",
    "headers": {"Authorization": "Bearer header-planted-6", "X-Other": "Bearer ${TOKEN}"},
}


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What one test conceals must not change the texts of another."""
    monkeypatch.setattr(redaction, "_ALL", redaction._Veil())
    monkeypatch.setattr(redaction, "_NAMED", redaction._Veil())
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        ("${KEY}", "${KEY}"),
        ("Bearer ${KEY}", "Bearer ${KEY}"),
        ("${env:KEY}", "${env:KEY}"),
        ("", ""),
        ("abc", "<hidden>"),
        ("Bearer abc", "<hidden>"),
        ("${KEY:-abc}", "<hidden>"),
        ("x${KEY}", "<hidden>"),
    ],
)
def test_a_setting_shows_references_and_nothing_else(value: str, seen: str) -> None:
    assert shown(value) == seen


@pytest.mark.parametrize(
    ("url", "seen"),
    [
        ("http://127.0.0.1:80/mcp", "http://127.0.0.1:80/mcp"),
        ("https://a:b@host/x?k=v&t=${T}#f", "https://<hidden>@host/x?k=<hidden>&t=${T}#f"),
        ("https://host/x?flag", "https://host/x?flag"),
    ],
)
def test_a_url_shows_where_and_not_who(url: str, seen: str) -> None:
    assert shown_url(url) == seen


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        (["-m", "server", "--corpus", "x"], ["-m", "server", "--corpus", "x"]),
        (["--api-key", "abc", "--verbose"], ["--api-key", "<hidden>", "--verbose"]),
        (["--header", "Authorization: Bearer abc"], ["--header", "<hidden>"]),
        (["--password=abc", "--token=${T}"], ["--password=<hidden>", "--token=${T}"]),
        (["run", "-e", "KEY=abc"], ["run", "-e", "KEY=<hidden>"]),
        (["sk-0123456789abcdef"], ["<hidden>"]),
        (["mcp-remote", "https://host/mcp?key=abc"], ["mcp-remote", "https://host/mcp?key=<hidden>"]),
    ],
)
def test_arguments_show_all_but_keys(arguments: list[str], seen: list[str]) -> None:
    assert shown_arguments(arguments) == seen


def test_what_looks_like_a_secret_is_struck_out_and_words_are_not() -> None:
    conceal("SERVICE_KEY", "secret")
    conceal("PLAIN", "longer-than-a-word")
    conceal("MODE", "fast")
    conceal("KIND", "evaluation")
    conceal("FOLDER_KEY", "/tmp")
    conceal("BASE", "https://en.wikipedia.org/wiki")
    conceal("Authorization", "Bearer sesame-1")
    assert hide("a secret, longer-than-a-word, fast, evaluation, /tmp, sesame-1") == (
        "a <hidden>, <hidden>, fast, evaluation, /tmp, <hidden>"
    )
    assert hide("https://en.wikipedia.org/wiki") == "https://en.wikipedia.org/wiki"
    assert hide_from_model("a secret, longer-than-a-word") == "a <hidden>, longer-than-a-word"


def test_a_secret_is_found_as_json_and_as_part_of_a_url() -> None:
    conceal("KEY", 'qu"ote/ü')
    assert hide('{"e": "qu\\"ote/\\u00fc", "f": "qu\\"ote/ü"} ?k=qu%22ote%2F%C3%BC') == (
        '{"e": "<hidden>", "f": "<hidden>"} ?k=<hidden>'
    )


def planted(folder: Path) -> Config:
    """The quick start with a server that is told six secrets."""
    config = load_config(ROOT / "configs" / "quickstart.toml")
    tools = {"mcpServers": {"one": ENTRY, "two": REMOTE}}
    return Config.model_validate(config.model_dump() | {"tools": tools, "run": {"dir": str(folder), "name": "r"}})


def test_a_runs_config_shows_no_secret_and_a_run_has_them_all(tmp_path: Path) -> None:
    config = planted(tmp_path)
    folder = RunFolder.create(config)
    text = folder.config.read_text()
    assert "planted" not in text
    assert "${OTHER_KEY}" in text and "Bearer ${TOKEN}" in text and "docs.jsonl" in text
    secrets = folder.path / "secrets.json"
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o600
    assert sorted(path.name for path in folder.path.rglob("*") if path.is_file()) == ["config.json", "secrets.json"]
    again = load_config(folder.config)
    assert again == config
    assert again.shared_digest == config.shared_digest


def test_without_its_secrets_a_run_is_the_same_run_but_its_servers_say_what_is_missing(tmp_path: Path) -> None:
    config = planted(tmp_path)
    folder = RunFolder.create(config)
    (folder.path / "secrets.json").unlink()
    bare = load_config(folder.config)
    assert bare.shared_digest == config.shared_digest, "hub and actor agree, whoever holds the keys"
    assert bare.tools.mcpServers["one"].env["API_KEY"] == "<hidden>"


def test_ranks_that_begin_a_run_at_the_same_moment_do_not_trip_over_the_secrets_of_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, opened = planted(tmp_path), os.open

    def another_is_faster(path: Path, flags: int, mode: int = 0o777) -> int:
        if "secrets" in path.name:
            monkeypatch.setattr(os, "open", opened)
            with monkeypatch.context() as other:
                other.setattr(os, "getpid", lambda: 1)
                RunFolder.at(tmp_path / "run", config)
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", another_is_faster)
    folder = RunFolder.at(tmp_path / "run", config)
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.json", "secrets.json"]
    assert stat.S_IMODE((folder.path / "secrets.json").stat().st_mode) == 0o600
    assert load_config(folder.config).tools == config.tools


def test_a_run_without_secrets_has_no_file_of_them(tmp_path: Path) -> None:
    folder = RunFolder.create(load_config(ROOT / "configs" / "quickstart.toml", [f"run.dir={tmp_path}"]))
    assert [path.name for path in folder.path.iterdir()] == ["config.json"]


def test_secrets_that_others_can_read_are_refused_with_the_remedy(tmp_path: Path) -> None:
    folder = RunFolder.create(planted(tmp_path))
    (folder.path / "secrets.json").chmod(0o644)
    with pytest.raises(UserError, match=r"can be read by others \(mode 0644\); run `chmod 600 "):
        load_config(folder.config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "tools.mcpServers.one.env.API_KEY=[1]",
            "tools.mcpServers.one.env.API_KEY = <hidden>: must be a valid",
        ),
        ("tools.mcpServers.one.environment.K=planted-7", "unknown option tools.mcpServers.one.environment = <hidden>;"),
        (
            "tools.mcpServers.one.headers=planted-8",
            "tools.mcpServers.one.headers = <hidden>: must be a section of names and values",
        ),
        ("tools.mcpServers.one.type=odd", "tools.mcpServers.one.type = 'odd': must be"),
    ],
)
def test_errors_quote_no_value_that_may_be_secret(override: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        load_config(ROOT / "configs" / "quickstart.toml", ["tools.mcpServers.one.command=x", override])
    assert message in str(raised.value)
    assert "planted" not in str(raised.value)


class Line(Record):
    """Something to measure."""

    remedy: str


def test_logs_metrics_and_errors_hold_no_secret_that_a_config_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    folder = RunFolder.create(planted(tmp_path))
    load_config(folder.config)
    spoken = " ".join([*map(str, ENTRY.values()), *map(str, REMOTE.values())])
    configure_logs(folder.log("actor-0"), "actor-0")
    structlog.get_logger().warning("server said", words=spoken, nested={"deep": [spoken]})
    try:
        raise ValueError(spoken)
    except ValueError:
        structlog.get_logger().exception("failed")
    metrics = MetricsFile(folder.metrics)
    metrics.append("actor", Line(remedy=spoken))
    metrics.close()

    def fail() -> int:
        raise UserError(spoken)

    assert run_command(fail) == 2
    sys.excepthook(ValueError, ValueError(spoken), None)
    written = [path.read_text() for path in (folder.log("actor-0"), folder.metrics)]
    for text in (*written, capsys.readouterr().err):
        assert "<hidden>" in text and "docs.jsonl" in text
        assert "planted" not in text


def test_a_terminal_log_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    configure_logs(None, "relay")
    conceal("KEY", "planted-9")
    structlog.get_logger().info("it is planted-9")
    assert "it is <hidden>" in screen.getvalue()
