"""Wrong input to the real commands: one line that names the thing, its value and the remedy; never a traceback."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from matpo.folder import RunFolder
from protocols.channel import new_keys
from tests.end_to_end.processes import QUICKSTART, ROOT, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

LIMIT_S = 60.0
"""Alone every command here ends within 30 s; other tests may keep the processors busy."""
SMALL = (
    "data.train.worlds=2",
    "data.train.questions=8",
    "data.evaluation.worlds=1",
    "data.evaluation.questions=2",
    "evaluation.questions=2",
    "actor.count=1",
)
CONFIG = str(QUICKSTART)
MODULES = {
    "matpo": "matpo",
    "matpo-actor": "actors",
    "matpo-learner": "learner",
}


def command(*words: str) -> subprocess.CompletedProcess[str]:
    """Run one of our commands to its end."""
    return finished(begun(*words))


def begun(*words: str) -> subprocess.Popen[str]:
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


def finished(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """The end of a command; one that does not end is killed with all it started."""
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            child.kill()
        out, err = process.communicate()
        raise AssertionError(f"no end within {LIMIT_S} s: {out}{err}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def refused(words: Sequence[str], named: Sequence[str]) -> None:
    """The command ends with 2 and one error line that holds every word of `named`."""
    in_one_line(command(*words), named)


def in_one_line(done: subprocess.CompletedProcess[str], named: Sequence[str]) -> None:
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert "Traceback" not in said and "Exception Group" not in said, said
    errors = [line for line in said.splitlines() if "error:" in line]
    assert len(errors) == 1, said
    assert done.stderr.rstrip().splitlines()[-1] == errors[0], said
    missing = [word for word in named if word not in errors[0]]
    assert not missing, f"{missing} not in: {errors[0]}"


@dataclass(frozen=True)
class Scene:
    """Files that are wrong in one way each; `{name}` in a case stands for one of them."""

    places: Mapping[str, str]

    def fill(self, words: Sequence[str]) -> list[str]:
        filled = []
        for word in words:
            for name, place in self.places.items():
                word = word.replace(f"<{name}>", place)
            filled.append(word)
        return filled


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    root = tmp_path_factory.mktemp("wrong")
    (root / "no_answers.jsonl").write_text('{"question": "a?", "answers": ["b"]}\n{"question": "c?"}\n')
    (root / "broken.jsonl").write_text('{"question": "a?", "answers": ["b"]}\n{"question": \n')
    (root / "broken.toml").write_text('[run\nname = "x"\n')
    (root / "broken.json").write_text('{"mcpServers": {')
    (root / "empty_run").mkdir()
    shipped = ROOT / "models" / "quickstart"
    for name, left_out in (("untokenized", "tokenizer.json"), ("weightless", "model.safetensors")):
        shutil.copytree(shipped, root / name, ignore=shutil.ignore_patterns(left_out))
    new_keys(root / "keys")
    new_keys(root / "other_keys")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield Scene({"dir": str(root), "port": str(taken.getsockname()[1])})


@pytest.fixture(scope="module", autouse=True)
def lonely_actor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """An actor whose hub never answers: it waits while the other tests run."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    state = tmp_path_factory.mktemp("lonely")
    process = begun("matpo-actor", CONFIG, *SMALL, "--hub", address, "--state", str(state))
    yield address, process
    if process.poll() is None:
        process.kill()
        process.communicate()


CHEAP = {
    # name: (command line, words its one line holds)
    "unknown option": (
        ["matpo", "config", CONFIG, "learner.lrr=1"],
        ["unknown option learner.lrr = 1", "did you mean 'lr'?"],
    ),
    "wrong value": (["matpo", "config", CONFIG, "learner.lr=fast"], ["learner.lr = 'fast'", "valid number"]),
    "bad override": (
        ["matpo", "config", CONFIG, "learner.lr"],
        ["'learner.lr'", "section.key=value", "learner.lr=1e-4"],
    ),
    "option of another kind": (
        ["matpo", "config", CONFIG, "data.train.kind=jsonl", "data.train.path=x.jsonl"],
        ["data.train.jsonl.first_seed = 2000", "known here: kind, limit, path", "replace the section: data.train="],
    ),
    "unknown argument": (["matpo", "run", CONFIG, "--dryrun"], ["'--dryrun'", "did you mean '--dry-run'?"]),
    "unknown command": (["matpo", "trian"], ["'trian'", "run", "doctor"]),
    "no config file": (["matpo", "config", "configs/quikstart.toml"], ["'configs/quikstart.toml'", "configs/"]),
    "broken config file": (["matpo", "config", "<dir>/broken.toml"], ["<dir>/broken.toml", "line 1"]),
    "unknown role": (["matpo", "config", CONFIG, "episode.root=boss"], ["'boss'", "planner", "worker"]),
    "missing dataset field": (
        ["matpo", "run", CONFIG, "--dry-run", 'data.train={kind="jsonl",path="<dir>/no_answers.jsonl"}'],
        ["<dir>/no_answers.jsonl:2", "'answers' is missing", "a row needs question (text) and answers"],
    ),
    "malformed dataset row": (
        ["matpo", "run", CONFIG, "--dry-run", 'data.train={kind="jsonl",path="<dir>/broken.jsonl"}'],
        ["<dir>/broken.jsonl:2", "not valid JSON", "one object per line"],
    ),
    "no dataset": (
        ["matpo", "run", CONFIG, "--dry-run", 'data.evaluation={kind="jsonl",path="<dir>/none.jsonl"}'],
        ["'<dir>/none.jsonl' does not exist", "give a JSONL file"],
    ),
    "no model": (
        ["matpo", "run", CONFIG, *SMALL, "model.path=<dir>/none"],
        ["model.path '<dir>/none'", "config.json", "models/quickstart"],
    ),
    "model without tokenizer": (
        ["matpo", "run", CONFIG, *SMALL, "model.path=<dir>/untokenized"],
        ["'<dir>/untokenized'", "tokenizer.json", "copy"],
    ),
    "model without weights": (
        ["matpo", "run", CONFIG, *SMALL, "model.path=<dir>/weightless"],
        ["'<dir>/weightless'", ".safetensors", "give a folder with weights"],
    ),
    "port in use": (
        ["matpo", "run", CONFIG, *SMALL, "run.dir=<dir>/runs", "hub.listen=tcp://127.0.0.1:<port>"],
        ["tcp://127.0.0.1:<port>", "in use", "set hub.listen to a free address"],
    ),
    "no address": (
        ["matpo", "run", CONFIG, *SMALL, "run.dir=<dir>/runs", "hub.listen=localhost:77"],
        ["'localhost:77'", "tcp://HOST:PORT"],
    ),
    "beyond this machine without keys": (
        ["matpo", "run", CONFIG, *SMALL, "run.dir=<dir>/runs", "hub.listen=tcp://0.0.0.0:0"],
        ["tcp://0.0.0.0:0", "matpo keys new", "hub.key_dir"],
    ),
    "no keys where the config says": (
        ["matpo", "run", CONFIG, *SMALL, "run.dir=<dir>/runs", "hub.key_dir=<dir>/no_keys"],
        ["<dir>/no_keys/hub.key does not exist", "matpo keys new"],
    ),
    "run folder that cannot be made": (
        ["matpo", "run", CONFIG, *SMALL, "run.dir=/proc/runs"],
        ["run.dir '/proc/runs'", "give another"],
    ),
    "resume of no run": (["matpo", "run", CONFIG, "--resume", "<dir>/empty_run"], ["'<dir>/empty_run'", "config.json"]),
    "resume with overrides": (
        ["matpo", "run", CONFIG, "--resume", "<dir>/empty_run", "learner.lr=1"],
        ["--resume", "no overrides", "keeps the settings"],
    ),
    "doctor of no run": (["matpo", "doctor", "<dir>/empty_run"], ["'<dir>/empty_run'", "`matpo run` made"]),
    "replay of no run": (["matpo", "replay", "<dir>/empty_run"], ["'<dir>/empty_run'", "`matpo run` made"]),
    "evaluation of no model": (
        ["matpo", "eval", CONFIG, *SMALL, "--model", "<dir>/none"],
        ["model.path '<dir>/none'", "config.json", "models/quickstart"],
    ),
    "adapter without model.lora": (
        ["matpo", "eval", CONFIG, *SMALL, "--adapter", "<dir>/none"],
        ["--adapter '<dir>/none'", "model.lora"],
    ),
    "model.lora without an adapter": (
        ["matpo", "eval", CONFIG, *SMALL, "model.lora.rank=4"],
        ["--adapter FOLDER", "remove model.lora"],
    ),
    "no adapter": (
        ["matpo", "eval", CONFIG, *SMALL, "model.lora.rank=4", "--adapter", "<dir>/none"],
        ["'<dir>/none'", "adapter_config.json"],
    ),
    "tool call with bad arguments": (
        ["matpo", "tools", "call", CONFIG, "search", "search", "{query}"],
        ["'{query}' are not JSON", "write them as"],
    ),
    "actor id that is no name": (
        ["matpo-actor", CONFIG, "--hub", "tcp://127.0.0.1:9", "--actor-id", "a b"],
        ["--actor-id 'a b'", "letters, digits"],
    ),
    "keys exist already": (
        ["matpo", "keys", "new", "<dir>/keys"],
        ["<dir>/keys/hub.key exists already", "choose another"],
    ),
    "no keys to show": (["matpo", "keys", "show", "<dir>/no_keys"], ["<dir>/no_keys", "matpo keys new"]),
    "no public key": (
        ["matpo", "keys", "allow", "<dir>/keys", "abc"],
        ["'abc'", "40 Z85 characters", "matpo keys show"],
    ),
    "learner of nothing": (["matpo-learner"], ["config file", "--run"]),
    "learner's overrides of an existing run": (
        ["matpo-learner", CONFIG, "--run", "<dir>/empty_run", "learner.lrr=1"],
        ["learner.lrr = 1", "'lr'"],
    ),
}


@pytest.mark.parametrize("name", CHEAP)
def test_what_is_wrong_is_said_before_anything_starts(name: str, scene: Scene) -> None:
    words, named = CHEAP[name]
    refused(scene.fill(words), scene.fill(named))


SERVER = "tools.mcpServers.search"
TOOLS = {
    "unset variable": (
        [f'{SERVER}.env={{KEY="${{NOT_SET_HERE}}"}}'],
        ["'search'", "${NOT_SET_HERE}", "export NOT_SET_HERE"],
    ),
    "command that does not exist": (
        [f'{SERVER}={{command="/no/such/server"}}'],
        ["'search' did not start", "/no/such/server"],
    ),
    "server that ends at once": (
        [f"""{SERVER}={{command="${{PYTHON}}",args=["-c","raise SystemExit('set MY_KEY')"]}}"""],
        ["'search' did not start", "set MY_KEY"],
    ),
    "server that is not there": (
        [f'{SERVER}={{url="http://127.0.0.1:9/mcp"}}'],
        ["'search' at http://127.0.0.1:9/mcp", "running"],
    ),
    "tools file that is broken": (["tools.file=<dir>/broken.json"], ["<dir>/broken.json", "not JSON"]),
    "tool that no server has": (
        ['episode.roles.worker.tools=["serch"]'],
        ["episode.roles.worker.tools", "'serch'", "the configured servers have: search"],
    ),
}


@pytest.mark.parametrize("name", TOOLS)
def test_a_dry_run_finds_what_is_wrong_with_the_tools(name: str, scene: Scene) -> None:
    overrides, named = TOOLS[name]
    refused(scene.fill(["matpo", "run", CONFIG, "--dry-run", *SMALL, *overrides]), scene.fill(named))


def test_tools_that_do_not_start_end_a_run_with_their_own_words(scene: Scene) -> None:
    wrong = f"""{SERVER}={{command="${{PYTHON}}",args=["-c","raise SystemExit('set MY_KEY')"]}}"""
    refused(
        scene.fill(["matpo", "run", CONFIG, *SMALL, "run.dir=<dir>/runs", wrong]),
        ["actor-0 could not go on", "'search' did not start", "set MY_KEY"],
    )


def test_an_actor_says_which_hub_did_not_answer(lonely_actor: tuple[str, subprocess.Popen[str]]) -> None:
    address, process = lonely_actor
    in_one_line(finished(process), [f"no hub answered at {address}", "start matpo-learner or correct the address"])


@pytest.fixture(scope="module")
def hub(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunFolder]:
    """A live hub that wants keys."""
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    settings = command(*scene.fill(["matpo", "config", CONFIG, *SMALL, "hub.key_dir=<dir>/keys"]))
    folder.config.write_text(settings.stdout)
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


def test_an_actor_with_a_wrong_key_is_told_how_to_be_let_in(hub: RunFolder, scene: Scene, tmp_path: Path) -> None:
    words = scene.fill(actor(hub, tmp_path, "hub.key_dir=<dir>/other_keys"))
    refused(words, ["does not accept the key", "matpo keys allow", "actor.key"])


def test_an_actor_with_other_settings_is_told_which_must_agree(hub: RunFolder, tmp_path: Path) -> None:
    refused(
        actor(hub, tmp_path, "rewards.answer_weight=0.5"),
        ["actor has config", "give both the same [episode], [tools], [rewards] and learner.group_size"],
    )


@pytest.mark.parametrize("program", ["matpo", "matpo-learner"])
def test_a_run_that_goes_on_is_not_started_twice(program: str, hub: RunFolder) -> None:
    again = ["matpo", "run", CONFIG, "--resume"] if program == "matpo" else ["matpo-learner", "--run"]
    address = hub.hub_address()
    assert address is not None
    refused([*again, str(hub.path)], [str(hub.path), "already going on", f"hub process {address.pid}"])
