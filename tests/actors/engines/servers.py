"""A real SGLang server on the CPU, shared by the tests that follow each other on models of the same shape."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from actors.engines.sglang.launch import command, environment, free_port, last_words
from matpo.config import Lora
from matpo.config import SglangEngine as Settings

PYTHON = Path(__file__).resolve().parents[3] / ".venv-sglang" / "bin" / "python"
START_LIMIT_S = 400.0
SHAPE = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "attention_bias", "tie_word_embeddings")


class SharedServer:
    """At most one server at a time: starting one takes half a minute and 2.4 GB."""

    def __init__(self, folder: Path, *, rows: int, context: int) -> None:
        self._folder = folder
        self._settings = Settings(
            python=str(PYTHON), device="cpu", dtype="float32", max_batch=rows, max_context_tokens=context
        )
        self._shape: tuple[object, ...] = ()
        self._process: subprocess.Popen[bytes] | None = None
        self._url = ""

    def url(self, model: Path, lora: Lora | None = None) -> str:
        """Of a server that may be given the weights of `model`; with `lora` it has them, and takes adapters."""
        config = json.loads((model / "config.json").read_text())
        shape = (*(config.get(key) for key in SHAPE), lora)
        if shape != self._shape:
            self.stop()
            self._start(model, config, lora)
            self._shape = shape
        return self._url

    def stop(self) -> None:
        """End the server, if there is one."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()
        self._process, self._shape = None, ()

    def _start(self, model: Path, config: dict[str, object], lora: Lora | None) -> None:
        """Without end tokens of its own: they come with every request."""
        copy = self._folder / "model"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(model, copy)
        (copy / "generation_config.json").unlink(missing_ok=True)
        (copy / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
        port, log = free_port(), self._folder / "server.log"
        with log.open("wb") as output:
            leash = [sys.executable, "-m", "actors.engines.sglang.leash"]
            self._process = subprocess.Popen(
                [*leash, *command(copy, self._settings, lora, port=port, seed=0)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=environment(self._settings),
            )
        self._url = f"http://127.0.0.1:{port}"
        began = time.monotonic()
        while not _healthy(self._url):
            if self._process.poll() is not None or time.monotonic() - began > START_LIMIT_S:
                self.stop()
                raise AssertionError(f"sglang did not start: {last_words(log)}")
            time.sleep(0.25)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=30) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False
