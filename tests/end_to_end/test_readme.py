"""What the README tells a newcomer to type works as printed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.processes import ROOT, SHORT, environment, matpo, only_run, short_run

README = (ROOT / "README.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def commands() -> list[list[str]]:
    """Every command line of the README's shell blocks, without its comment."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("runs")
    done = matpo(*short_run(parent))
    assert done.returncode == 0, done.stdout + done.stderr
    return only_run(parent)


def test_the_readme_is_short_and_shows_a_command_at_once() -> None:
    assert len(README.split()) <= 900
    assert len(README.split("```bash")[0].split()) <= 60


def test_every_make_target_of_the_readme_exists() -> None:
    targets = [command[1] for command in commands() if command[0] == "make"]
    assert targets
    for target in targets:
        assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_the_readmes_commands_work_as_printed(finished_run: Path) -> None:
    typed = [command for command in commands() if command[0] == "matpo"]
    assert typed
    for command in typed:
        arguments = [str(finished_run) if word == "RUN" else word for word in command[1:]]
        done = matpo(*arguments)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"


def test_two_terminals_train_together_as_printed(tmp_path: Path) -> None:
    (learner,) = (command for command in commands() if command[0] == "matpo-learner")
    (actor,) = (command for command in commands() if command[0] == "matpo-actor")
    state = tmp_path / "two"
    port = "tcp://127.0.0.1:7741"

    def printed(command: list[str]) -> list[str]:
        words = [str(state) if word == "runs/two" else word.replace("tcp://127.0.0.1:7700", port) for word in command]
        return [str(BIN / words[0]), *words[1:], *SHORT]

    with subprocess.Popen(printed(learner), cwd=ROOT, env=environment()) as hub:
        played = subprocess.run(printed(actor), cwd=ROOT, env=environment(), timeout=300, check=False)
        assert hub.wait(timeout=60) == 0
    assert played.returncode == 0
    assert (state / "summary.json").is_file()


def test_the_rooms_of_the_readmes_map_exist() -> None:
    rooms = re.findall(r"^\| `(\w+)/` \|", README, flags=re.MULTILINE)
    assert set(rooms) >= {"protocols", "matpo", "actors", "learner", "tool_servers", "benchmarks"}
    assert all((ROOT / room).is_dir() for room in rooms)
