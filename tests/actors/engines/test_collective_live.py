"""Weights broadcast into a real SGLang server: the same as from a folder, whatever happens to the sender."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import anyio
import numpy as np
import psutil
import pytest
from transformers import PreTrainedModel

from actors.engines.engine import EngineFailure, Generation
from actors.engines.sglang.engine import SglangEngine
from actors.engines.sglang.link import SENDER
from matpo.config import Sampling
from matpo.config import SglangEngine as Settings
from protocols.weights import weights_digest
from tests.actors.engines.conftest import OpenEngine
from tests.actors.engines.models import hugging_face_logprobs, make_model, prompt_of, weights_of
from tests.actors.engines.servers import PYTHON
from tests.actors.engines.stub import Stub
from tests.actors.engines.test_contract import check_swap_in_flight, generate_all

pytestmark = pytest.mark.sglang
SAMPLING = Sampling(temperature=0, max_tokens=10)
PROMPTS = [prompt_of(6, seed=seed) for seed in range(4)]


@pytest.fixture
def broadcast(open_sglang: OpenEngine) -> OpenEngine:
    return open_sglang.using(handover="collective", python=str(PYTHON))


def senders() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if str(SENDER) in child.cmdline()]


def check(answers: list[Generation], model: PreTrainedModel, *, version: int) -> None:
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        expected = hugging_face_logprobs(model, prompt, answer.tokens)
        np.testing.assert_allclose(answer.logprobs, expected, atol=1e-4, rtol=0)
        assert answer.versions.tolist() == [version] * 10


async def test_a_broadcast_leaves_the_server_as_a_folder_would(
    open_sglang: OpenEngine, broadcast: OpenEngine, tmp_path: Path
) -> None:
    model, other = make_model("qwen3", tmp_path), make_model("qwen3", tmp_path / "other", seed=5)
    async with open_sglang(tmp_path) as engine:
        await engine.load(weights_of(model), version=0)
        from_disk = await generate_all(engine, PROMPTS, SAMPLING)
        await engine.load(weights_of(other), version=1)
    async with broadcast(tmp_path) as engine:
        report = await engine.load(weights_of(model), version=2)
        answers = await generate_all(engine, PROMPTS, SAMPLING)
        assert len(senders()) == 1
    check(answers, model, version=2)
    assert report.digest == weights_digest(weights_of(model))
    for first, second in zip(from_disk, answers, strict=True):
        assert first.tokens.tolist() == second.tokens.tolist()
        np.testing.assert_allclose(first.logprobs, second.logprobs, atol=1e-5, rtol=0)  # batched otherwise
    assert not senders()


@pytest.mark.parametrize("swap", ["retract", "in_place", "abort"])
async def test_every_kind_of_swap_is_exact_with_broadcasts_too(
    broadcast: OpenEngine, tmp_path: Path, swap: str
) -> None:
    await check_swap_in_flight(broadcast.using(swap=swap), tmp_path)


async def test_a_dead_sender_is_replaced(broadcast: OpenEngine, tmp_path: Path) -> None:
    model, other = make_model("qwen3", tmp_path), make_model("qwen3", tmp_path / "other", seed=5)
    async with broadcast(tmp_path) as engine:
        await engine.load(weights_of(other), version=0)
        (sender,) = senders()
        sender.kill()
        await engine.load(weights_of(model), version=1)
        check(await generate_all(engine, PROMPTS, SAMPLING), model, version=1)


DYING = """
import os, runpy, signal, sys
import torch.distributed
count = 0
broadcast = torch.distributed.broadcast
def once(*arguments, **options):
    global count
    count += 1
    if count == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return broadcast(*arguments, **options)
torch.distributed.broadcast = once
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def dying_once(tmp_path: Path) -> Iterator[str]:
    """An interpreter whose first sender is killed when it should broadcast for the second time."""
    program, script, started = tmp_path / "dying.py", tmp_path / "python", tmp_path / "started"
    program.write_text(DYING)
    script.write_text(
        f'#!/bin/sh\nif mkdir {started} 2>/dev/null; then exec {PYTHON} {program} "$@"; fi\nexec {PYTHON} "$@"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    yield str(script)
    assert started.is_dir()


async def test_a_sender_killed_in_the_middle_of_a_session_is_replaced_and_the_weights_sent_again(
    broadcast: OpenEngine, tmp_path: Path, dying_once: str
) -> None:
    model, other = make_model("qwen3", tmp_path / "model"), make_model("qwen3", tmp_path / "other", seed=5)
    async with broadcast.using(python=dying_once)(tmp_path / "model") as engine:
        await engine.load(weights_of(other), version=0)
        (first,) = senders()
        await engine.load(weights_of(model), version=1)
        (second,) = senders()
        check(await generate_all(engine, PROMPTS, SAMPLING), model, version=1)
    assert first.pid != second.pid


async def test_a_server_that_never_joins_keeps_no_other_from_its_weights(broadcast: OpenEngine, tmp_path: Path) -> None:
    model, stub = make_model("qwen3", tmp_path), Stub()
    assert isinstance(broadcast.settings, Settings) and broadcast.server is not None
    real = broadcast.server.url(tmp_path)
    with anyio.fail_after(150):
        async with stub.serve():
            settings = broadcast.settings.model_copy(update={"urls": (real, stub.url)})
            async with SglangEngine.open(tmp_path, settings, seed=0, log=tmp_path / "log") as engine:
                await engine.load(weights_of(model), version=4)
                assert [server.client.url for server in engine.fleet.usable] == [real]
                check(await generate_all(engine, PROMPTS, SAMPLING), model, version=4)
    assert stub.asked("/init_weights_update_group")


async def test_senders_that_cannot_be_started_leave_the_old_weights_in_use(
    open_sglang: OpenEngine, broadcast: OpenEngine, tmp_path: Path
) -> None:
    model = make_model("qwen3", tmp_path)
    async with broadcast.using(python="/bin/false")(tmp_path) as engine:
        with pytest.raises(EngineFailure, match="the sender has died"):
            await engine.load(weights_of(model), version=0)
    async with open_sglang(tmp_path) as engine:  # the server is not left paused or inside a session
        await engine.load(weights_of(model), version=1)
        with anyio.fail_after(60):
            check(await generate_all(engine, PROMPTS, SAMPLING), model, version=1)
