"""Engines that sample with adapters, checked against PEFT in float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anyio
import numpy as np
import pytest
from peft import PeftModel
from transformers import PreTrainedModel

from actors.engines.engine import Engine, Generation
from matpo.config import Lora, Sampling
from protocols.records import Tokens
from protocols.weights import Weights, weights_digest
from tests.actors.engines.conftest import CONTEXT, OpenEngine
from tests.actors.engines.models import adapt, adapter_of, hugging_face_logprobs, make_model, prompt_of, weights_of
from tests.actors.engines.test_contract import generate_all, wait_until_sampled

LORA = Lora(rank=4, alpha=6.0)
ROLES = LORA.model_copy(update={"roles": {"planner": "shared", "worker": "own", "critic": "frozen"}})
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


Played = dict[str, PreTrainedModel | PeftModel]
"""Role → the model that must have sampled its tokens."""


def played_by(model: PreTrainedModel, *, shared: int, own: int) -> Played:
    """With the adapters of these seeds."""
    return {"planner": adapt(model, LORA, seed=shared), "worker": adapt(model, LORA, seed=own), "critic": model}


def adapters_of(played: Played) -> Weights:
    """As they travel: the shared adapter, and the worker's own."""
    shared, own = played["planner"], played["worker"]
    assert isinstance(shared, PeftModel) and isinstance(own, PeftModel)
    return {**adapter_of(shared), **{f"worker/{name}": tensor for name, tensor in adapter_of(own).items()}}


def assert_exact(played: Played, role: str, prompt: Tokens, answer: Generation, *, version: int) -> None:
    expected = hugging_face_logprobs(played[role], prompt, answer.tokens)
    np.testing.assert_allclose(answer.logprobs, expected, atol=1e-4, rtol=0, err_msg=f"{role}, version {version}")
    assert set(answer.versions.tolist()) == {version}


async def ask_all_roles(engine: Engine, prompts: Sequence[Tokens], sampling: Sampling) -> dict[str, list[Generation]]:
    """What every role says to each prompt, all asked at once."""
    answers: dict[tuple[str, int], Generation] = {}

    async def ask(role: str, number: int) -> None:
        adapter = ROLES.adapter_of(role)
        answer = await engine.generate(prompts[number], sampling, deadline_s=PATIENCE_S, adapter=adapter)
        answers[role, number] = answer

    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            for number in range(len(prompts)):
                for role in ROLES.roles:
                    tasks.start_soon(ask, role, number)
    return {role: [answers[role, number] for number in range(len(prompts))] for role in ROLES.roles}


async def test_every_role_is_played_by_its_own_adapter_and_a_frozen_one_by_none(
    open_engine: OpenEngine, tmp_path: Path
) -> None:
    played = played_by(make_model("qwen3", tmp_path), shared=1, own=2)
    prompts = [prompt_of(6), prompt_of(11, seed=1), prompt_of(6)]
    async with open_engine.adapted(ROLES)(tmp_path) as engine:
        for version in (3, 4):
            report = await engine.load(adapters_of(played), version=version)
        answers = await ask_all_roles(engine, prompts, Sampling(max_tokens=8))
    for role in ROLES.roles:
        for prompt, answer in zip(prompts, answers[role], strict=True):
            assert_exact(played, role, prompt, answer, version=4)
    assert report.digest == engine.digests[4] == weights_digest(adapters_of(played))


@pytest.mark.sglang
@pytest.mark.parametrize("running", ROLES.roles)
async def test_new_adapters_of_all_roles_come_in_while_a_role_goes_on_with_its_old_one(
    open_sglang: OpenEngine, tmp_path: Path, running: str
) -> None:
    model, prompt = make_model("qwen3", tmp_path), prompt_of(6)
    versions = [played_by(model, shared=2 * number, own=2 * number + 1) for number in range(3)]
    old: list[Generation] = []
    async with open_sglang.adapted(ROLES)(tmp_path) as engine:
        await engine.load(adapters_of(versions[0]), version=0)

        async def run() -> None:
            adapter = ROLES.adapter_of(running)
            long = Sampling(max_tokens=CONTEXT)
            old.append(await engine.generate(prompt, long, deadline_s=2 * PATIENCE_S, adapter=adapter))

        with anyio.fail_after(2 * PATIENCE_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(run)
                await wait_until_sampled(engine, 5)
                for version in (1, 2):
                    report = await engine.load(adapters_of(versions[version]), version=version)
                    assert report.pause_s == 0.0
                    for role, (answer,) in (await ask_all_roles(engine, [prompt], Sampling(max_tokens=4))).items():
                        assert_exact(versions[version], role, prompt, answer, version=version)
                assert not old, "the first request was to be still running"
    assert_exact(versions[0], running, prompt, old[0], version=0)
    assert len(old[0].tokens) == CONTEXT - len(prompt)
