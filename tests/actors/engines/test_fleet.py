"""Several servers behind one engine, and everything that can happen to one of them, with stubs."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from subprocess import PIPE, Popen

import anyio
import numpy as np
import pytest
from transformers import PreTrainedModel

from actors.engines.engine import EngineFailure, Generation
from actors.engines.sglang import fleet, keeper, server
from actors.engines.sglang.affinity import choose
from actors.engines.sglang.engine import SglangEngine
from matpo.config import Sampling
from matpo.config import SglangEngine as Settings
from matpo.errors import UserError
from protocols.weights import weights_digest
from tests.actors.engines.models import make_model, weights_of
from tests.actors.engines.stub import PATHS, Stub
from tests.actors.engines.test_sglang import PROMPT, sums_of

PATIENCE_S = 30.0


@pytest.fixture
def model(tmp_path: Path) -> PreTrainedModel:
    return make_model("qwen3", tmp_path)


def settings_of(urls: Sequence[str], **options: object) -> Settings:
    basis = Settings(urls=tuple(urls), device="cpu", dtype="float32", max_context_tokens=32, stream_tokens=1)
    return basis.model_copy(update=options)


def group_of(url: str, urls: Sequence[str]) -> str:
    """A group that goes to the server at `url` when all are idle."""
    return next(f"g{n}" for n in range(1_000) if choose(f"g{n}", dict.fromkeys(urls, 0)) == url)


@asynccontextmanager
async def serving(model: PreTrainedModel, *stubs: Stub) -> AsyncIterator[list[str]]:
    async with AsyncExitStack() as stack:
        stack.enter_context(anyio.fail_after(PATIENCE_S))
        for stub in stubs:
            stub.checksums = sums_of(model)
            await stack.enter_async_context(stub.serve())
        yield [stub.url for stub in stubs]


async def ask(engine: SglangEngine, group: str, *, max_tokens: int = 5) -> Generation:
    return await engine.generate(PROMPT, Sampling(max_tokens=max_tokens), deadline_s=PATIENCE_S, group=group)


async def test_requests_of_a_group_meet_one_server_and_groups_use_all(model: PreTrainedModel, tmp_path: Path) -> None:
    stubs = (Stub(), Stub())
    async with serving(model, *stubs) as urls, SglangEngine.open(tmp_path, settings_of(urls), seed=0) as engine:
        await engine.load(weights_of(model), version=0)
        for stub in stubs:
            others = [len(other.asked("/generate")) for other in stubs if other is not stub]
            for _ in range(4):
                await ask(engine, group_of(stub.url, urls))
            assert others == [len(other.asked("/generate")) for other in stubs if other is not stub]
            assert len(stub.asked("/generate")) == 4


async def test_a_request_whose_server_breaks_goes_on_elsewhere_and_every_token_keeps_its_version(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    first, second = Stub(hold_after=3), Stub()
    weights, answers = weights_of(model), []
    async with serving(model, first, second) as urls, SglangEngine.open(tmp_path, settings_of(urls), seed=0) as engine:
        await engine.load(weights, version=7)

        async def one() -> None:
            answers.append(await ask(engine, group_of(first.url, urls)))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one)
            await wait_until_sampled(engine, 3)
            first.refuses_weights = True
            report = await engine.load(weights, version=8)  # one takes it, the other is not to be used any more
        assert engine.version == 8 and report.version == 8
        assert dict(engine.digests) == dict.fromkeys((7, 8), weights_digest(weights))
    assert answers[0].tokens.tolist() == [1, 2, 3, 1, 2]
    assert answers[0].versions.tolist() == [7, 7, 7, 8, 8]
    np.testing.assert_array_equal(answers[0].logprobs, np.full(5, -0.6931472, dtype=np.float32))
    assert second.asked("/generate")[0]["input_ids"] == [40, 41, 1, 2, 3]
    assert [body["rid"] for body in first.asked("/abort_request")] == [first.asked("/generate")[0]["rid"]]


async def test_a_server_that_refused_weights_is_used_again_once_it_has_them(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    first, second = Stub(), Stub(refuses_weights=True)
    async with serving(model, first, second) as urls, SglangEngine.open(tmp_path, settings_of(urls), seed=0) as engine:
        await engine.load(weights_of(model), version=1)
        group = group_of(second.url, urls)
        assert (await ask(engine, group)).versions.tolist() == [1] * 5 and not second.asked("/generate")
        assert "no room" in (await engine.health()).detail
        second.refuses_weights = False
        await engine.fleet.wait(lambda: len(engine.fleet.usable) == 2)
        assert (await ask(engine, group)).versions.tolist() == [1] * 5 and len(second.asked("/generate")) == 1


async def test_a_server_that_does_not_go_on_after_a_swap_is_not_used(model: PreTrainedModel, tmp_path: Path) -> None:
    first, second = Stub(), Stub(stays_paused=True)
    async with serving(model, first, second) as urls, SglangEngine.open(tmp_path, settings_of(urls), seed=0) as engine:
        await engine.load(weights_of(model), version=1)
        await ask(engine, group_of(second.url, urls))
        assert not second.asked("/generate") and "does not go on" in engine.fleet.servers[second.url].keeper.detail


async def test_when_no_server_takes_weights_the_load_fails_and_says_why_of_each(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    stubs = (Stub(refuses_weights=True), Stub(refuses_weights=True))
    async with serving(model, *stubs) as urls, SglangEngine.open(tmp_path, settings_of(urls), seed=0) as engine:
        with pytest.raises(EngineFailure) as failure:
            await engine.load(weights_of(model), version=1)
        assert all(f"server {url}: HTTP 400: no room" in str(failure.value) for url in urls)
        assert engine.version == -1


async def test_a_server_that_takes_much_longer_than_others_delays_no_load(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "LAG_S", 0.2)
    first, second = Stub(), Stub(hang_updates=True)
    async with serving(model, first, second) as urls, SglangEngine.open(tmp_path, settings_of(urls), seed=0) as engine:
        await engine.load(weights_of(model), version=1)
        assert engine.version == 1 and [server.name for server in engine.fleet.usable] == [first.url]
        second.hang_updates = False
        await engine.fleet.wait(lambda: len(engine.fleet.usable) == 2)


async def test_the_engines_version_is_the_lowest_of_its_usable_servers(model: PreTrainedModel, tmp_path: Path) -> None:
    first, second = Stub(), Stub()
    async with serving(model, first, second) as urls, SglangEngine.open(tmp_path, settings_of(urls), seed=0) as engine:
        await engine.load(weights_of(model), version=1)
        second.hang_updates = True
        async with anyio.create_task_group() as tasks:

            async def load() -> None:
                await engine.load(weights_of(model), version=2)

            tasks.start_soon(load)
            quick, slow = (engine.fleet.servers[url] for url in urls)
            with anyio.fail_after(PATIENCE_S):
                while quick.version < 2:
                    await anyio.lowlevel.checkpoint()
            assert (engine.version, slow.version) == (1, 1)
            assert (await ask(engine, group_of(first.url, urls))).versions.tolist() == [2] * 5
            tasks.cancel_scope.cancel()


async def test_a_server_that_was_restarted_unseen_samples_nothing_before_it_has_the_newest_weights(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    stub = Stub()
    async with serving(model, stub) as urls, SglangEngine.open(tmp_path, settings_of(urls), seed=0) as engine:
        await engine.load(weights_of(model), version=6)
        stub.version = "default"
        answer = await ask(engine, "g")
    assert answer.versions.tolist() == [6] * 5 and len(stub.asked("/generate")) == 2
    assert [body["weight_version"] for body in stub.asked("/update_weights_from_disk")] == ["6", "6"]


async def test_a_slow_server_gets_its_share_and_the_others_do_the_work(model: PreTrainedModel, tmp_path: Path) -> None:
    slow, quick = Stub(hold_after=0), Stub()
    async with serving(model, slow, quick) as urls, SglangEngine.open(tmp_path, settings_of(urls), seed=0) as engine:
        await engine.load(weights_of(model), version=0)
        group = group_of(slow.url, urls)
        async with anyio.create_task_group() as tasks:
            for _ in range(40):
                tasks.start_soon(ask, engine, group)
                await anyio.lowlevel.checkpoint()
            while len(quick.asked("/generate")) + len(slow.asked("/generate")) < 40:
                await anyio.lowlevel.checkpoint()
            assert len(slow.asked("/generate")) <= 26  # 1.25 · 41 / 2 = 25.6
            slow.go_on.set()


async def test_a_request_that_breaks_every_server_it_meets_is_given_up(model: PreTrainedModel, tmp_path: Path) -> None:
    stubs = (Stub(always_break=True), Stub(always_break=True))
    async with serving(model, *stubs) as urls, SglangEngine.open(tmp_path, settings_of(urls), seed=0) as engine:
        await engine.load(weights_of(model), version=0)
        with pytest.raises(EngineFailure, match="5 sglang servers in a row broke a request"):
            await ask(engine, "g")
    assert sum(len(stub.asked("/generate")) for stub in stubs) == 5


@contextmanager
def process_of(model: PreTrainedModel) -> Iterator[tuple[Popen[bytes], str]]:
    """A stub that streams 2 tokens and then waits forever, in a process of its own."""
    arguments = [sys.executable, "-m", "tests.actors.engines.stub", "2", json.dumps(sums_of(model))]
    with Popen(arguments, stdout=PIPE) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().decode().strip()
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
async def test_requests_of_a_server_that_freezes_or_dies_go_on_elsewhere(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    for name, seconds in {"PULSE_S": 0.1, "DOUBT_S": 0.5}.items():
        monkeypatch.setattr(keeper, name, seconds)
    answers: list[Generation] = []
    other = Stub()
    with process_of(model) as (process, url):
        async with serving(model, other):
            urls = [url, other.url]
            async with SglangEngine.open(tmp_path, settings_of(urls), seed=0) as engine:
                await engine.load(weights_of(model), version=3)
                group = group_of(url, urls)

                async def one() -> None:
                    answers.append(await ask(engine, group))

                async with anyio.create_task_group() as tasks:
                    for _ in range(2):
                        tasks.start_soon(one)
                    await wait_until_sampled(engine, 2)
                    os.kill(process.pid, number)
                await ask(engine, group)  # new ones avoid it
                state = engine.fleet.servers[url].keeper.state
    assert [answer.versions.tolist() for answer in answers] == [[3] * 5] * 2
    assert any(answer.tokens.tolist() == [1, 2, 1, 2, 3] for answer in answers)
    assert state in ("silent", "suspected", "failed")


async def test_a_server_that_froze_and_thaws_is_used_again(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in {"PULSE_S": 0.1, "DOUBT_S": 0.5}.items():
        monkeypatch.setattr(keeper, name, seconds)
    with process_of(model) as (process, url):
        async with serving(model), SglangEngine.open(tmp_path, settings_of([url]), seed=0) as engine:
            await engine.load(weights_of(model), version=3)
            os.kill(process.pid, signal.SIGSTOP)
            await engine.fleet.wait(lambda: engine.fleet.servers[url].keeper.state == "silent")
            assert (await engine.health()).state == "failed"
            os.kill(process.pid, signal.SIGCONT)
            await engine.fleet.wait(lambda: bool(engine.fleet.usable))
            assert len((await ask(engine, "", max_tokens=2)).tokens) == 2


async def test_a_server_that_freezes_while_it_takes_weights_is_named_and_given_up_long_before_the_swaps_deadline(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in {"PULSE_S": 0.05, "DOUBT_S": 0.3, "LOST_S": 1.0}.items():
        monkeypatch.setattr(keeper, name, seconds)
    stub = Stub()
    async with serving(model, stub) as urls, SglangEngine.open(tmp_path, settings_of(urls), seed=0) as engine:
        await engine.load(weights_of(model), version=1)
        stub.hang_updates, stub.silent = True, ("/health",)  # as a real one's scheduler that is busy loading
        kept = engine.fleet.servers[stub.url].keeper
        async with anyio.create_task_group() as tasks:

            async def load() -> None:
                await engine.load(weights_of(model), version=2)

            tasks.start_soon(load)
            before = stub.looks
            while stub.looks < before + 3:
                await anyio.wait_all_tasks_blocked()
            assert kept.busy and kept.state == "ready"
            stub.silent = ("/health", "/model_info")
            await engine.fleet.wait(lambda: kept.state == "silent")
            assert (await engine.health()).silent == (stub.url,)
            await engine.fleet.wait(lambda: "did not answer for" in kept.detail)
            tasks.cancel_scope.cancel()


async def test_a_server_that_freezes_while_it_takes_its_first_weights_after_a_restart_is_given_up_too(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in {"PULSE_S": 0.05, "DOUBT_S": 0.3, "LOST_S": 1.0, "FIRST_PAUSE_S": 0.05}.items():
        monkeypatch.setattr(keeper, name, seconds)
    monkeypatch.setattr(server, "PAUSE_DEADLINE_S", 0.3)
    stub = Stub()
    async with serving(model, stub) as urls, SglangEngine.open(tmp_path, settings_of(urls), seed=0) as engine:
        await engine.load(weights_of(model), version=1)
        kept, updates = engine.fleet.servers[stub.url].keeper, "/update_weights_from_disk"
        stub.hang_updates = True
        kept.condemn("the test ends it")
        while len(stub.asked(updates)) < 2:  # the weights it was told of when it came up again
            await anyio.wait_all_tasks_blocked()
        stub.silent = ("/health", "/model_info")
        await engine.fleet.wait(lambda: kept.state == "silent")
        assert (await engine.health()).silent == (stub.url,)
        await engine.fleet.wait(lambda: "did not answer for" in kept.detail)
        assert kept.starts == 2
        stub.hang_updates, stub.silent = False, ()
        await engine.fleet.wait(lambda: bool(engine.fleet.usable))
        assert (await ask(engine, "")).versions.tolist() == [1] * 5


async def test_a_server_without_version_spans_is_refused_unless_swaps_abort(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    old = Stub(paths=[path for path in PATHS if path != "/begin_weight_update"])
    async with serving(model, old) as urls:
        with pytest.raises(UserError, match=r"does not say which weights sampled which token.*swap = \"abort\""):
            async with SglangEngine.open(tmp_path, settings_of(urls), seed=0):
                pass
        async with SglangEngine.open(tmp_path, settings_of(urls, swap="abort"), seed=0) as engine:
            await engine.load(weights_of(model), version=0)
            assert (await ask(engine, "")).versions.tolist() == [0] * 5


async def test_one_server_of_several_that_cannot_start_ends_the_start_with_its_own_words(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    first = 'case "$*" in *"--random-seed 11"*) echo "Error: no GPU" >&2; exit 3;; esac'
    python.write_text(f"#!/bin/sh\n{first}\nsleep 60\n")
    python.chmod(0o755)
    settings = Settings(python=str(python), servers=2, device="cpu", max_context_tokens=32)
    message = r"sglang server 0 did not start: .*status 3.*no GPU"
    with anyio.fail_after(PATIENCE_S), pytest.raises(UserError, match=message):
        async with SglangEngine.open(tmp_path, settings, seed=9, log=tmp_path / "engine.log"):
            pass
    assert (tmp_path / "engine-0.log").read_text() == "Error: no GPU\n" and (tmp_path / "engine-1.log").is_file()


async def wait_until_sampled(engine: SglangEngine, tokens: int) -> None:
    with anyio.fail_after(PATIENCE_S):
        while engine.fleet.counts.sampled < tokens:
            await anyio.lowlevel.checkpoint()
