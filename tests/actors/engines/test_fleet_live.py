"""Two real SGLang servers behind one engine: one is killed, restarted and frozen, and nothing is lost or mislabelled.
The same two behind the real router."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

import anyio
import anyio.lowlevel
import anyio.to_thread
import numpy as np
import psutil
import pytest
from transformers import PreTrainedModel

from actors.engines.engine import Generation
from actors.engines.sglang import keeper
from actors.engines.sglang.affinity import choose
from actors.engines.sglang.engine import SglangEngine
from actors.engines.sglang.launch import free_port, last_words
from matpo.config import Sampling
from matpo.config import SglangEngine as Settings
from protocols.records import Tokens
from protocols.weights import weights_digest
from tests.actors.engines.conftest import CONTEXT, ROWS
from tests.actors.engines.models import hugging_face_logprobs, make_model, prompt_of, weights_of
from tests.actors.engines.servers import PYTHON, START_LIMIT_S, SharedServer

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(2_400)]

PATIENCE_S = 2 * START_LIMIT_S
REQUESTS = 6


def group_of(name: str, names: Sequence[str]) -> str:
    return next(f"g{n}" for n in range(100) if choose(f"g{n}", dict.fromkeys(names, 0)) == name)


async def test_the_kill_and_the_freezing_of_a_server_lose_no_request_and_mislabel_no_token(
    server: SharedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.stop()
    monkeypatch.setattr(keeper, "LOST_S", 30.0)
    old, new = make_model("qwen3", tmp_path, seed=0), make_model("qwen3", tmp_path / "new", seed=5)
    settings = Settings(
        python=str(PYTHON),
        servers=2,
        device="cpu",
        dtype="float32",
        max_batch=REQUESTS,
        max_context_tokens=CONTEXT,
        stream_tokens=1,
    )
    async with SglangEngine.open(tmp_path, settings, seed=0, log=tmp_path / "engine.log") as engine:
        await engine.load(weights_of(old), version=5)

        killed = await generate_during(engine, signal_to(engine, "0", signal.SIGKILL))
        check(killed, {5: old})
        with anyio.fail_after(PATIENCE_S):
            await engine.fleet.wait(lambda: engine.fleet.servers["0"].keeper.state != "ready")
        assert (await engine.health()).detail.count("ready") == 1

        await engine.load(weights_of(new), version=6)  # one server took them, the other finds them when it is back
        assert engine.version == 6
        await wait_usable(engine, 2)
        assert engine.fleet.servers["0"].keeper.starts == 2
        check(await generate_during(engine, lambda: None), {6: new})

        frozen = await generate_during(engine, signal_to(engine, "0", signal.SIGSTOP))
        check(frozen, {6: new})
        await engine.load(weights_of(old), version=7)
        assert engine.version == 7
        await wait_usable(engine, 2)  # it was given up, killed and started again
        assert engine.fleet.servers["0"].keeper.starts == 3
        check(await generate_during(engine, lambda: None), {7: old})
        digests = {5: weights_digest(weights_of(old)), 6: weights_digest(weights_of(new))}
        assert dict(engine.digests) == {**digests, 7: digests[5]}


@pytest.mark.parametrize("kind", ["smg", "sglang_router"])
async def test_the_real_router_carries_tokens_while_weights_go_past_it(
    server: SharedServer, tmp_path: Path, second: SharedServer, kind: RouterKind
) -> None:
    model, new = make_model("qwen3", tmp_path), make_model("qwen3", tmp_path / "new", seed=5)
    urls = [await anyio.to_thread.run_sync(each.url, tmp_path) for each in (server, second)]
    with Router(kind, urls, tmp_path / "router.log") as url:
        settings = Settings(router=url, device="cpu", dtype="float32", max_context_tokens=CONTEXT, stream_tokens=1)
        async with SglangEngine.open(tmp_path, settings, seed=0) as engine:
            assert sorted(engine.fleet.servers) == sorted(urls)
            await engine.load(weights_of(model), version=1)
            assert engine.fleet.router is not None and engine.fleet.router.usable
            check(await generate_during(engine, lambda: None), {1: model})
            for version in range(2, 20):  # the requests may end before the swap: then try again
                before, after = ((model, new), (new, model))[version % 2]
                swapped = await generate_during(engine, lambda: None, load=(after, version))
                check(swapped, {version - 1: before, version: after})
                seen = {int(v) for answer in swapped for v in answer.versions}
                if len(seen) == 2:
                    break
            assert seen == {version - 1, version}
            assert engine.fleet.router.usable
            health = await engine.health()
    assert health.prompt_tokens > health.cached_tokens > 0
    spread = {name: server.line.running for name, server in engine.fleet.servers.items()}
    assert not any(spread.values())


async def generate_during(
    engine: SglangEngine, event: Callable[[], None], *, load: tuple[PreTrainedModel, int] | None = None
) -> list[Generation]:
    """Answers of several requests, to each server some; the event comes when all of them are being sampled."""
    names = sorted(engine.fleet.servers)
    groups = [group_of(name, names) for name in names]
    answers: dict[int, Generation] = {}

    async def one(number: int) -> None:
        answers[number] = await engine.generate(
            prompt_of(8, seed=number), Sampling(max_tokens=CONTEXT), deadline_s=PATIENCE_S, group=groups[number % 2]
        )

    before = engine.fleet.counts.sampled
    async with anyio.create_task_group() as tasks:
        for number in range(REQUESTS):
            tasks.start_soon(one, number)
        with anyio.fail_after(PATIENCE_S):
            while engine.fleet.counts.sampled < before + 5 * REQUESTS:
                await anyio.lowlevel.checkpoint()
        event()
        if load is not None:
            await engine.load(weights_of(load[0]), version=load[1])
    return [answers[number] for number in range(REQUESTS)]


def check(answers: Sequence[Generation], models: dict[int, PreTrainedModel]) -> None:
    """Every token has the log-probability that the model of its version gives it (keys and values are recomputed)."""
    for number, answer in enumerate(answers):
        whole: Tokens = np.concatenate([prompt_of(8, seed=number), answer.tokens])
        assert answer.stop == "context" and len(whole) == CONTEXT
        assert set(answer.versions.tolist()) <= set(models)
        for version, model in models.items():
            (places,) = np.nonzero(answer.versions == version)
            if len(places):
                split = 8 + int(places[0])
                end = split + len(places)
                expected = hugging_face_logprobs(model, whole[:split], whole[split:end])
                np.testing.assert_allclose(answer.logprobs[places], expected, atol=1e-4, rtol=0)


async def wait_usable(engine: SglangEngine, count: int) -> None:
    with anyio.fail_after(PATIENCE_S):
        await engine.fleet.wait(lambda: len(engine.fleet.usable) == count)


def signal_to(engine: SglangEngine, name: str, number: signal.Signals) -> Callable[[], None]:
    """For all processes of a server but its leash. They are looked up now: answers would not wait for that."""
    port = engine.fleet.servers[name].client.url.rpartition(":")[2]
    (leash,) = [process for process in psutil.Process().children() if f"--port {port}" in " ".join(process.cmdline())]
    processes = leash.children(recursive=True)

    def send() -> None:
        for process in processes:
            process.send_signal(number)

    return send


RouterKind = Literal["smg", "sglang_router"]
ROUTERS: Final[Mapping[RouterKind, Sequence[str]]] = {
    "smg": ("smg", "launch", "--policy", "consistent_hashing"),
    "sglang_router": ("sglang_router.launch_router", "--policy", "manual"),
}
"""Module and options of each, with a policy that keeps a group on one server."""


class Router:
    """A real router in front of two servers."""

    def __init__(self, kind: RouterKind, urls: Sequence[str], log: Path) -> None:
        self._module = ROUTERS[kind]
        self._urls = urls
        self._log = log

    def __enter__(self) -> str:
        port, metrics = free_port(), free_port()
        options = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics)]
        options += ["--worker-urls", *self._urls]
        leash = [sys.executable, "-m", "actors.engines.sglang.leash"]
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                [*leash, str(PYTHON), "-m", *self._module, *options],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
            )
        url = f"http://127.0.0.1:{port}"
        began = time.monotonic()
        while not self._has_workers(url):
            if self._process.poll() is not None or time.monotonic() - began > START_LIMIT_S:
                self.__exit__()
                raise AssertionError(f"the router did not start: {last_words(self._log)}")
            time.sleep(0.25)
        return url

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _has_workers(self, url: str) -> bool:
        try:
            with urllib.request.urlopen(f"{url}/workers", timeout=10) as reply:
                return len(json.load(reply)["workers"]) == len(self._urls)
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return False


@pytest.fixture
def second(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedServer]:
    """Another real server."""
    shared = SharedServer(tmp_path_factory.mktemp("second"), rows=ROWS, context=CONTEXT)
    yield shared
    shared.stop()
