"""What only a real SGLang server can show: every kind of swap, filtered sampling, whole replies, a death."""

from __future__ import annotations

from pathlib import Path

import anyio
import numpy as np
import psutil
import pytest
import torch
from transformers import PreTrainedModel

from actors.engines.engine import Generation
from actors.engines.sglang.engine import SglangEngine
from matpo.config import Sampling
from matpo.config import SglangEngine as Settings
from protocols.records import Floats, Tokens
from tests.actors.engines.conftest import CONTEXT, OpenEngine
from tests.actors.engines.models import hugging_face_logprobs, make_model, prompt_of, weights_of
from tests.actors.engines.servers import PYTHON, SharedServer
from tests.actors.engines.test_contract import (
    check_swap_in_flight,
    generate_all,
    wait_until_sampled,
)

pytestmark = pytest.mark.sglang


@pytest.mark.parametrize("swap", ["in_place", "abort"])
async def test_the_other_ways_to_swap_are_exact_too(open_sglang: OpenEngine, tmp_path: Path, swap: str) -> None:
    await check_swap_in_flight(open_sglang.using(swap=swap), tmp_path)


async def test_whole_replies_hold_the_same_as_streamed_ones(open_sglang: OpenEngine, tmp_path: Path) -> None:
    model = make_model("qwen3", tmp_path)
    async with open_sglang.using(stream_tokens=0)(tmp_path) as engine:
        await engine.load(weights_of(model), version=2)
        answers = await generate_all(engine, [prompt_of(6, seed=n) for n in range(6)], Sampling(max_tokens=9))
    for seed, answer in enumerate(answers):
        expected = hugging_face_logprobs(model, prompt_of(6, seed=seed), answer.tokens)
        np.testing.assert_allclose(answer.logprobs, expected, atol=1e-4, rtol=0)
        assert answer.versions.tolist() == [2] * 9


async def test_filtered_logprobs_are_those_of_the_distribution_drawn_from(
    open_sglang: OpenEngine, tmp_path: Path
) -> None:
    model = make_model("qwen3", tmp_path)
    sampling = Sampling(temperature=0.7, top_k=5, top_p=0.8, max_tokens=12)
    async with open_sglang(tmp_path) as engine:
        await engine.load(weights_of(model), version=0)
        answers = await generate_all(engine, [prompt_of(6, seed=n) for n in range(6)], sampling)
    for seed, answer in enumerate(answers):
        expected = filtered_logprobs(model, prompt_of(6, seed=seed), answer.tokens, sampling)
        np.testing.assert_allclose(answer.logprobs, expected, atol=1e-4, rtol=0)


def filtered_logprobs(model: PreTrainedModel, prompt: Tokens, sampled: Tokens, sampling: Sampling) -> Floats:
    """log μ after temperature, then top-k, then top-p over the whole distribution, renormalised."""
    whole = torch.from_numpy(np.concatenate([prompt, sampled]).astype(np.int64))[None]
    with torch.no_grad():
        p_TV = torch.softmax(model(whole).logits[0, len(prompt) - 1 : -1].double() / sampling.temperature, dim=-1)
    sorted_TV, order_TV = p_TV.sort(dim=-1, descending=True)
    before_TV = sorted_TV.cumsum(dim=-1) - sorted_TV
    kept_TV = (torch.arange(p_TV.shape[1]) < sampling.top_k) & (before_TV <= sampling.top_p)
    kept_TV = torch.zeros_like(kept_TV).scatter(1, order_TV, kept_TV)
    p_TV = torch.where(kept_TV, p_TV, 0.0)
    p_TV /= p_TV.sum(dim=-1, keepdim=True)
    picked = p_TV.gather(1, whole[0, len(prompt) :, None])[:, 0].log()
    return np.asarray(picked.numpy(), dtype=np.float32)


@pytest.mark.timeout(1_500)
async def test_a_killed_server_is_started_again_and_its_request_goes_on_from_its_tokens(
    server: SharedServer, tmp_path: Path
) -> None:
    server.stop()
    model = make_model("qwen3", tmp_path)
    settings = Settings(
        python=str(PYTHON), device="cpu", dtype="float32", max_batch=4, max_context_tokens=CONTEXT, stream_tokens=1
    )
    answers: list[Generation] = []
    async with SglangEngine.open(tmp_path, settings, seed=0, log=tmp_path / "log") as engine:
        await engine.load(weights_of(model), version=5)

        async def one() -> None:
            answers.append(await engine.generate(prompt_of(4), Sampling(max_tokens=CONTEXT), deadline_s=700))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one)
            await wait_until_sampled(engine, 5)
            kill_server()
        health = await engine.health()
    expected = hugging_face_logprobs(model, prompt_of(4), answers[0].tokens)
    np.testing.assert_allclose(answers[0].logprobs, expected, atol=1e-4, rtol=0)
    assert answers[0].versions.tolist() == [5] * (CONTEXT - 4) and answers[0].stop == "context"
    assert health.state == "ready"


def kill_server() -> None:
    """As the system does to a process that takes too much memory."""
    leashes = [p for p in psutil.Process().children() if "actors.engines.sglang.leash" in p.cmdline()]
    assert len(leashes) == 1
    leashes[0].children()[0].kill()
