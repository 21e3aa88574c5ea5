"""Engines that sample with adapters, checked against PEFT in float32."""

from __future__ import annotations

from pathlib import Path

import anyio
import numpy as np
import pytest

from actors.engines.engine import Generation
from matpo.config import Lora, Sampling
from protocols.weights import weights_digest
from tests.actors.engines.conftest import CONTEXT, OpenEngine
from tests.actors.engines.models import adapt, adapter_of, hugging_face_logprobs, make_model, prompt_of, weights_of
from tests.actors.engines.test_contract import generate_all, wait_until_sampled

LORA = Lora(rank=4, alpha=6.0)
PATIENCE_S = 60.0


async def test_logprobs_under_an_adapter_are_those_of_peft(open_engine: OpenEngine, tmp_path: Path) -> None:
    adapted = adapt(make_model("qwen3", tmp_path), LORA, seed=1)
    prompts = [prompt_of(5 + seed, seed=seed) for seed in range(6)]
    async with open_engine.adapted(LORA)(tmp_path) as engine:
        report = await engine.load(adapter_of(adapted), version=3)
        answers = await generate_all(engine, prompts, Sampling(max_tokens=12))
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = hugging_face_logprobs(adapted, prompt, answer.tokens)
        np.testing.assert_allclose(answer.logprobs, expected, atol=1e-4, rtol=0)
        assert answer.versions.tolist() == [3] * 12
    assert report.digest == weights_digest(adapter_of(adapted))


async def test_an_adapter_of_another_shape_is_refused_and_the_old_one_stays(
    open_engine: OpenEngine, tmp_path: Path
) -> None:
    model = make_model("qwen3", tmp_path)
    adapter = adapter_of(adapt(model, LORA, seed=1))
    async with open_engine.adapted(LORA)(tmp_path) as engine:
        await engine.load(adapter, version=1)
        with pytest.raises(ValueError, match=r"down_proj\.lora_A\.weight is \(2, 64\), expected \(4, 64\)"):
            await engine.load(adapter_of(adapt(model, Lora(rank=2), seed=1)), version=2)
        with pytest.raises(ValueError, match="missing"):
            await engine.load(weights_of(model), version=2)
        assert (engine.version, engine.digests[1]) == (1, weights_digest(adapter))


@pytest.mark.sglang
async def test_requests_finish_with_the_adapter_they_began_with_while_new_ones_use_the_next(
    open_sglang: OpenEngine, tmp_path: Path
) -> None:
    model = make_model("qwen3", tmp_path)
    adapted = [adapt(model, LORA, seed=seed) for seed in range(2)]
    old: list[Generation] = []
    prompt = prompt_of(6)
    async with open_sglang.adapted(LORA)(tmp_path) as engine:
        await engine.load(adapter_of(adapted[0]), version=0)

        async def one() -> None:
            old.append(await engine.generate(prompt, Sampling(max_tokens=CONTEXT), deadline_s=PATIENCE_S))

        with anyio.fail_after(2 * PATIENCE_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(one)
                await wait_until_sampled(engine, 5)
                report = await engine.load(adapter_of(adapted[1]), version=1)
                new = await engine.generate(prompt, Sampling(max_tokens=8), deadline_s=PATIENCE_S)
                assert not old, "the first request was to be still running"
        after = await engine.generate(prompt, Sampling(max_tokens=8), deadline_s=PATIENCE_S)
    assert report.pause_s == 0.0
    for answer, version in ((old[0], 0), (new, 1), (after, 1)):
        assert set(answer.versions.tolist()) == {version}
        expected = hugging_face_logprobs(adapted[version], prompt, answer.tokens)
        np.testing.assert_allclose(answer.logprobs, expected, atol=1e-4, rtol=0)


@pytest.mark.sglang
async def test_parts_of_what_the_server_holds_as_one_projection_may_be_adapted(
    open_sglang: OpenEngine, tmp_path: Path
) -> None:
    lora = Lora(rank=4, alpha=6.0, target_modules=("q_proj", "k_proj", "up_proj"))
    adapted = adapt(make_model("qwen3", tmp_path), lora, seed=2)
    async with open_sglang.adapted(lora)(tmp_path) as engine:
        await engine.load(adapter_of(adapted), version=0)
        answer = await engine.generate(prompt_of(6), Sampling(max_tokens=8), deadline_s=PATIENCE_S)
    expected = hugging_face_logprobs(adapted, prompt_of(6), answer.tokens)
    np.testing.assert_allclose(answer.logprobs, expected, atol=1e-4, rtol=0)


async def test_every_role_is_played_by_its_own_adapter_and_a_frozen_one_by_none(
    open_engine: OpenEngine, tmp_path: Path
) -> None:
    lora = LORA.model_copy(update={"roles": {"planner": "shared", "worker": "own", "critic": "frozen"}})
    model = make_model("qwen3", tmp_path)
    shared, own = (adapt(model, LORA, seed=seed) for seed in (1, 2))
    weights = {**adapter_of(shared), **{f"worker/{name}": tensor for name, tensor in adapter_of(own).items()}}
    prompt, sampling = prompt_of(6), Sampling(max_tokens=8)
    async with open_engine.adapted(lora)(tmp_path) as engine:
        for version in (3, 4):
            report = await engine.load(weights, version=version)
        answers = {
            role: await engine.generate(prompt, sampling, deadline_s=PATIENCE_S, adapter=lora.adapter_of(role))
            for role in lora.roles
        }
    for role, played_by in (("planner", shared), ("worker", own), ("critic", model)):
        expected = hugging_face_logprobs(played_by, prompt, answers[role].tokens)
        np.testing.assert_allclose(answers[role].logprobs, expected, atol=1e-4, rtol=0)
        assert set(answers[role].versions.tolist()) == {4}
    assert report.digest == engine.digests[4] == weights_digest(weights)
