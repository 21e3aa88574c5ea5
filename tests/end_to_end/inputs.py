"""What wrong input looks like: the files it names, and how a command is run in this process as a user would run it."""

from __future__ import annotations

import shlex
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import orjson

import actors.__main__
import actors.evaluate
import actors.tools.__main__
import actors.weights.relay
import learner.__main__
import learner.doctor
import learner.trainer.replay
import matpo.cli.main
from learner.hub.journal import Journal
from matpo.errors import run_command
from matpo.folder import RunFolder
from matpo.load import load_config
from protocols.channel import new_actor_keys, new_keys
from tests.end_to_end.processes import QUICKSTART, ROOT

ENTRIES: Mapping[str, Callable[[Sequence[str]], int]] = {
    "matpo": matpo.cli.main.dispatch,
    "matpo-actor": actors.__main__.run,
    "matpo-learner": learner.__main__.run,
    "matpo-relay": actors.weights.relay.run,
    "matpo doctor": learner.doctor.run,
    "matpo replay": learner.trainer.replay.run,
    "matpo eval": actors.evaluate.run,
    "matpo tools": actors.tools.__main__.main,
}
"""Where each command begins; the last four are processes of their own that `matpo` starts."""
SMALL = ("data.train.worlds=2", "data.train.questions=8", "data.evaluation.worlds=1", "data.evaluation.questions=2")
QUESTION = '{"question": "a?", "answers": ["b"]}\n'
FILES: Mapping[str, str | bytes] = {
    "broken.toml": '[run\nname = "x"\n',
    "latin.toml": '[run]\nname = "caf\xe9"\n'.encode("latin-1"),
    "list.toml": "model = []\n",
    "list.json": "[1, 2]",
    "broken.json": '{"run": ',
    "settings.yaml": "run:\n  steps: 3\n",
    "empty.toml": "",
    "no_answers.jsonl": QUESTION + '{"question": "c?"}\n',
    "broken.jsonl": QUESTION + '{"question": \n',
    "text_answers.jsonl": '{"question": "c?", "answers": "d"}\n',
    "empty_question.jsonl": '{"question": " ", "answers": ["d"]}\n',
    "no_right_answer.jsonl": '{"question": "c?", "answers": []}\n',
    "extra_field.jsonl": '{"question": "c?", "answers": ["d"], "level": 3}\n',
    "rows_of_lists.jsonl": '["c?", ["d"]]\n',
    "bad_arguments.jsonl": '{"question": "c?", "answers": ["d"], "tool_arguments": {"search": 3}}\n',
    "latin.jsonl": '{"question": "caf\xe9?", "answers": ["d"]}\n'.encode("latin-1"),
    "array.jsonl": "[\n" + QUESTION.strip() + ",\n" + QUESTION.strip() + "\n]\n",
    "empty.jsonl": "\n\n",
    "table.csv": "question,answers\na?,b\n",
    "no_servers.json": '{"servers_": {}}',
    "mcp_list.json": '{"mcpServers": [1]}',
    "mcp_broken.json": '{"mcpServers": {',
    "mcp_typo.json": '{"mcpServers": {"search": {"command": "x", "enviroment": {"API_KEY": "planted-5"}}}}',
    "mcp_number.json": '{"mcpServers": {"search": {"command": "x", "env": {"API_KEY": 12345678}}}}',
    "mcp_entry.json": '{"mcpServers": {"search": "x"}}',
    "mcp_ours.json": '{"mcpServers": {"search": {"command": "x", "retries": 3}}}',
    "mcp_twice.json": '{"mcpServers": {"search": {"command": "x"}}}',
    "mcp_input.json": '{"servers": {"search": {"command": "x", "args": ["${input:api-key}"]}}}',
    "wrong.env": "API_KEY planted-6\n",
    "template.jinja": "{% for message in messages %}{{ message.content }",
}


@dataclass(frozen=True)
class Scene:
    """What stands in the table for what is elsewhere in every test: `<dir>` for the folder of wrong files, `<port>` for
    one that is taken, `<quickstart>` for its settings, `<small>` for the same with few questions."""

    folder: Path
    port: int

    def fill(self, text: str) -> str:
        for name, value in self._places.items():
            text = text.replace(name, value)
        return text

    def blank(self, text: str) -> str:
        """The other way round."""
        for name, value in self._places.items():
            text = text.replace(value, name)
        return text

    @property
    def _places(self) -> Mapping[str, str]:
        settings = str(QUICKSTART.relative_to(ROOT))
        return {
            "<dir>": str(self.folder),
            "<port>": str(self.port),
            "<python>": sys.executable,
            "<small>": " ".join((settings, *SMALL)),
            "<quickstart>": settings,
        }


@contextmanager
def scene(folder: Path) -> Iterator[Scene]:
    """Write everything that is wrong into `folder`."""
    for name, content in FILES.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    _write_models(folder)
    _write_runs(folder)
    _write_keys(folder)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield Scene(folder, taken.getsockname()[1])


def _write_models(folder: Path) -> None:
    shipped = ROOT / "models" / "quickstart"
    left_out = {
        "untokenized": "tokenizer.json",
        "weightless": "model.safetensors",
        "pickled": "model.safetensors",
    }
    for name, file in left_out.items():
        shutil.copytree(shipped, folder / name, ignore=shutil.ignore_patterns(file))
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    damaged: Mapping[str, tuple[str, bytes]] = {
        "bad_tokenizer": ("tokenizer.json", b'{"version": '),
        "other_tokenizer": ("tokenizer.json", b'{"version": "1.0"}'),
        "bad_config": ("config.json", b'{"model_type": '),
        "unknown_type": ("config.json", b'{"model_type": "gpt-none"}'),
        "cut_weights": ("model.safetensors", (shipped / "model.safetensors").read_bytes()[:5000]),
        "html_weights": ("model.safetensors", b"<html>404</html>"),
    }
    for name, (file, content) in damaged.items():
        shutil.copytree(shipped, folder / name)
        (folder / name / file).write_bytes(content)
    shutil.copytree(shipped, folder / "wider")
    settings = orjson.loads((shipped / "config.json").read_bytes())
    (folder / "wider" / "config.json").write_bytes(
        orjson.dumps(settings | {"hidden_size": 2 * settings["hidden_size"]})
    )
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"")


def _write_runs(folder: Path) -> None:
    (folder / "empty_run").mkdir()
    config = load_config(QUICKSTART)
    for name in ("run", "damaged_run", "foreign_run", "begun_run", "broken_run", "damaged_hub", "old_run"):
        (folder / name).mkdir()
        RunFolder(folder / name).write_config(config)
    (folder / "damaged_run" / "journal.sqlite").write_bytes(b"no database at all, but long enough to be one" * 100)
    (folder / "foreign_run" / "config.json").write_text('{"model": {"path": "x"}, "surprise": 1}')
    (folder / "begun_run" / "secrets.json").write_text("{")
    (folder / "begun_run" / "secrets.json").chmod(0o600)
    (folder / "begun_run" / "config.json").write_text('{"tools": {"mcpServers": {}}}')
    (folder / "broken_run" / "config.json").write_text('{"run": ')
    (folder / "damaged_hub" / "hub.json").write_text("{")
    with Journal.open(folder / "old_run" / "journal.sqlite"):
        (folder / "old_run" / "metrics.jsonl").write_text('[1]\n{"stage": "hub", "time": 1}\n')
    (folder / "a_file").write_text("")


def _write_keys(folder: Path) -> None:
    for name in ("keys", "other_keys", "open_keys", "damaged_keys", "open_list"):
        new_keys(folder / name)
    (folder / "open_keys" / "hub.key").chmod(0o644)
    (folder / "damaged_keys" / "hub.key").write_text("{}")
    (folder / "open_list" / "allowed_actors").chmod(0o666)
    new_actor_keys(folder / "relay_keys", hub="x" * 40)


@dataclass(frozen=True)
class Said:
    """What a command wrote, and how it ended."""

    code: int
    out: str
    err: str


def in_process(command: str) -> Said:
    """Run a command line in this process."""
    words = shlex.split(command)
    known = 2 if " ".join(words[:2]) in ENTRIES else 1
    entry, arguments = ENTRIES[" ".join(words[:known])], words[known:]
    hook = sys.excepthook
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        try:
            code = run_command(lambda: entry(arguments))
        except SystemExit as end:  # argparse, for a command line that it does not take
            code = end.code if isinstance(end.code, int) else 1
        finally:
            sys.excepthook = hook
    return Said(code, out.getvalue(), err.getvalue())
