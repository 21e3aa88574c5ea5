"""Secrets planted in a configuration: after real commands they are in no file but the one made for them."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from tests.end_to_end.processes import QUICKSTART, environment, matpo, only_run, short_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

LEAKY = r"""import os, sys
sys.stderr.write(f'cannot log in with {os.environ["SERVICE_KEY"]} {sys.argv[-1]}\n')
sys.exit(1)
"""
PLANTED = ("planted-in-env-1", "planted-in-header-2", "planted-in-query-3", "planted-in-shell-4", "planted-argument-5")


def settings(parent: Path) -> list[str]:
    """The quick start's search server with a key it does not need, and a remote one that is switched off."""
    return [
        f'tools.mcpServers.search.env={{SEARCH_KEY="{PLANTED[0]}",SHELL_KEY="${{PLANTED_SHELL}}"}}',
        'tools.mcpServers.remote={url="http://127.0.0.1:9/mcp?key=planted-in-query-3",disabled=true,'
        'headers={Authorization="Bearer planted-in-header-2"}}',
    ]


def holders(folder: Path) -> dict[str, set[str]]:
    """Which files hold which of the planted secrets."""
    found: dict[str, set[str]] = {}
    for path in folder.rglob("*"):
        if path.is_file() and (seen := {word for word in PLANTED if word.encode() in path.read_bytes()}):
            found[path.name] = seen
    return found


def test_a_run_writes_its_secrets_to_one_private_file_and_says_them_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANTED_SHELL", PLANTED[3])
    done = matpo(*short_run(tmp_path, "run.steps=1", "evaluation.questions=0", "actor.count=1", *settings(tmp_path)))
    assert done.returncode == 0, done.stdout + done.stderr
    run = only_run(tmp_path)
    assert holders(run) == {"secrets.json": set(PLANTED[:3])}
    assert stat.S_IMODE((run / "secrets.json").stat().st_mode) == 0o600
    for secret in PLANTED:
        assert secret not in done.stdout + done.stderr
    assert '"SEARCH_KEY": "<hidden>"' in (run / "config.json").read_text()
    assert '"SHELL_KEY": "${PLANTED_SHELL}"' in (run / "config.json").read_text()


def test_a_server_that_shouts_its_key_is_quoted_without_it(tmp_path: Path) -> None:
    script = tmp_path / "leaky.py"
    script.write_text(LEAKY)
    leaky = (
        f'tools.mcpServers.leaky={{command="${{PYTHON}}",args=["{script}","--token","{PLANTED[4]}"],'
        f'env={{SERVICE_KEY="{PLANTED[0]}"}}}}'
    )
    for command in (
        ["tools", "check", str(QUICKSTART), leaky],
        ["run", str(QUICKSTART), "--dry-run", leaky],
        list(short_run(tmp_path / "runs", "actor.count=1", leaky)),
    ):
        done = matpo(*command)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "cannot log in with <hidden> <hidden>" in " ".join((done.stdout + done.stderr).split())
        for secret in PLANTED:
            assert secret not in done.stdout + done.stderr
    assert holders(only_run(tmp_path / "runs")) == {"secrets.json": {PLANTED[0], PLANTED[4]}}


def test_the_resolved_settings_show_no_secret(tmp_path: Path) -> None:
    done = matpo("config", str(QUICKSTART), *settings(tmp_path))
    assert done.returncode == 0, done.stderr
    for secret in PLANTED:
        assert secret not in done.stdout + done.stderr
    assert "http://127.0.0.1:9/mcp?key=<hidden>" in done.stdout


def test_the_environment_of_these_tests_has_no_secret_to_begin_with() -> None:
    assert not set(PLANTED) & set(environment().values())
