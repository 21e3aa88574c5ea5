"""Wrong input to the real commands: one line that names the thing, its value and the remedy; never a traceback.

`bad_input.txt` is the table: a command and the line it ends with.
"""

from __future__ import annotations

import itertools
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import structlog

from matpo.folder import RunFolder
from tests.end_to_end.inputs import SMALL, Said, Scene, in_process, scene
from tests.end_to_end.processes import QUICKSTART, ROOT, environment

LIMIT_S = 60.0
"""Alone every command here ends within 30 s; other tests may keep the processors busy."""
CONFIG = str(QUICKSTART)
MODULES = {"matpo": "matpo", "matpo-actor": "actors", "matpo-learner": "learner"}
AS_PROCESSES = (
    "matpo config <quickstart> learner.lrr=1",
    "matpo doctor <dir>/empty_run",
    "matpo tools check <quickstart> tools.file=<dir>/mcp_broken.json",
    "matpo-actor <quickstart> --hub tcp://127.0.0.1:9 --actor-id 'a b'",
    "matpo-learner",
)
"""Of the table, run as users run them too."""


def table() -> dict[str, str]:
    """Command → the line it ends with."""
    lines = (Path(__file__).parent / "bad_input.txt").read_text(encoding="utf-8").splitlines()
    return {line.removeprefix("$ "): said for line, said in itertools.pairwise(lines) if line[:2] == "$ "}


TABLE = table()


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with scene(tmp_path_factory.mktemp("wrong")) as made:
        yield made


@pytest.fixture
def logs_as_before() -> Iterator[None]:
    """Commands configure the logs of their process, which here is that of all tests."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)
    structlog.contextvars.clear_contextvars()


def ends_with(said: Said, line: str) -> None:
    """The command ended with 2 and this one error."""
    whole = said.out + said.err
    assert said.code == 2, whole
    assert "Traceback" not in whole and "Exception Group" not in whole, whole
    assert sum("error: " in line for line in whole.splitlines()) == 1, whole
    assert said.err.rstrip().splitlines()[-1] == line


def test_the_table_is_long() -> None:
    assert len(TABLE) > 170


@pytest.mark.parametrize("command", TABLE)
def test_what_is_wrong_is_said_in_one_line(
    command: str, wrong: Scene, logs_as_before: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    ends_with(in_process(wrong.fill(command)), wrong.fill(TABLE[command]))


def begun(words: list[str]) -> subprocess.Popen[str]:
    """Start one of our commands."""
    program, *arguments = words
    return subprocess.Popen(
        [sys.executable, "-m", MODULES[program], *arguments],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> Said:
    """The end of a command; one that does not end is killed with all it started."""
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            child.kill()
        out, err = process.communicate()
        raise AssertionError(f"no end within {LIMIT_S} s: {out}{err}") from None
    return Said(process.returncode, out, err)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("command", AS_PROCESSES)
def test_a_process_says_the_same(command: str, wrong: Scene) -> None:
    ends_with(finished(begun(shlex.split(wrong.fill(command)))), wrong.fill(TABLE[command]))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_dry_run_finds_a_tool_that_no_server_has() -> None:
    dry = ["matpo", "run", CONFIG, "--dry-run", *SMALL, 'episode.roles.worker.tools=["serch"]']
    ends_with(
        finished(begun(dry)),
        "error: episode.roles.worker.tools: no tool matches 'serch'; the configured servers have: search",
    )


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_tools_that_do_not_start_end_a_run_with_their_own_words(tmp_path: Path) -> None:
    wrong = """tools.mcpServers.search={command="${PYTHON}",args=["-c","raise SystemExit('set MY_KEY')"]}"""
    said = finished(begun(["matpo", "run", CONFIG, *SMALL, "actor.count=1", f"run.dir={tmp_path}", wrong]))
    ends_with(
        said,
        "error: actor-0 could not go on: tool server 'search' did not start: the connection ended; command:"
        f" {sys.executable} -c raise SystemExit('set MY_KEY'); its last lines: set MY_KEY",
    )


@pytest.fixture(scope="module")
def hub(wrong: Scene, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunFolder]:
    """A live hub that wants keys."""
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    settings = in_process(f"matpo config {CONFIG} {' '.join(SMALL)} hub.key_dir={wrong.folder / 'keys'}")
    folder.config.write_text(settings.out)
    with subprocess.Popen(
        [sys.executable, "-m", "learner.hub", "--run", str(folder.path)],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
    ) as process:
        try:
            deadline = time.monotonic() + LIMIT_S
            while folder.hub_address() is None:
                assert process.poll() is None and time.monotonic() < deadline, "the hub did not start"
                time.sleep(0.1)  # another process writes the file; there is nothing here to wait on
            yield folder
        finally:
            process.send_signal(signal.SIGTERM)


def actor(hub: RunFolder, state: Path, *overrides: str) -> list[str]:
    address = hub.hub_address()
    assert address is not None
    return ["matpo-actor", str(hub.config), *overrides, "--hub", address.endpoint, "--state", str(state)]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_an_actor_with_a_wrong_key_is_told_how_to_be_let_in(hub: RunFolder, wrong: Scene, tmp_path: Path) -> None:
    address = hub.hub_address()
    keys = in_process(f"matpo keys show {wrong.folder / 'other_keys'}").out.splitlines()
    other_hub, mine = keys[0].split()[1], keys[1].split()[1]
    assert address is not None
    ends_with(
        finished(begun(actor(hub, tmp_path, f"hub.key_dir={wrong.folder / 'other_keys'}"))),
        f"error: hub at {address.endpoint} does not accept the key {mine}; there, run `matpo keys allow DIR '{mine}'`,"
        f" and check that its public key is {other_hub}",
    )


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_an_actor_with_other_settings_is_told_which_must_agree(hub: RunFolder, tmp_path: Path) -> None:
    said = finished(begun(actor(hub, tmp_path, "rewards.answer_weight=0.5")))
    assert said.code == 2 and "Traceback" not in said.err
    assert "error: the hub refused this actor: actor has config" in said.err
    assert "give both the same [episode], [tools], [rewards] and learner.group_size" in said.err


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("program", ["matpo", "matpo-learner"])
def test_a_run_that_goes_on_is_not_started_twice(program: str, hub: RunFolder) -> None:
    again = ["matpo", "run", CONFIG, "--resume"] if program == "matpo" else ["matpo-learner", "--run"]
    address = hub.hub_address()
    assert address is not None
    ends_with(
        finished(begun([*again, str(hub.path)])),
        f"error: run {str(hub.path)!r} is already going on (hub process {address.pid}); wait for it or stop it first",
    )
