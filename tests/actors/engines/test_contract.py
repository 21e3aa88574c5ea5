"""What every engine promises, checked against Hugging Face in float32."""

from __future__ import annotations

from pathlib import Path

import anyio
import anyio.lowlevel
import numpy as np
import pytest
from transformers import PreTrainedModel

from actors.engines.engine import Engine, EngineFailure, Generation
from matpo.config import Sampling
from protocols.records import Tokens
from protocols.weights import weights_digest
from tests.actors.engines.conftest import CONTEXT, OpenEngine
from tests.actors.engines.models import (
    END,
    VOCABULARY,
    filtered_logprobs,
    hugging_face_logprobs,
    hugging_face_logprobs_after_swap,
    make_model,
    prompt_of,
    weights_of,
)

PATIENCE_S = 60.0


async def generate_all(engine: Engine, prompts: list[Tokens], sampling: Sampling) -> list[Generation]:
    answers: dict[int, Generation] = {}

    async def one(index: int) -> None:
        answers[index] = await engine.generate(prompts[index], sampling, deadline_s=PATIENCE_S)

    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            for index in range(len(prompts)):
                tasks.start_soon(one, index)
    return [answers[index] for index in range(len(prompts))]


async def wait_until_sampled(engine: Engine, tokens: int) -> None:
    with anyio.fail_after(PATIENCE_S):
        while (await engine.health()).sampled_tokens < tokens:
            await anyio.lowlevel.checkpoint()


async def test_turns_that_extend_an_earlier_answer_and_prompts_with_a_shared_start_stay_exact(
    open_engine: OpenEngine, tmp_path: Path
) -> None:
    model = make_model("llama", tmp_path)
    shared = prompt_of(24, seed=99)
    prompts = [np.concatenate([shared, prompt_of(1 + n, seed=n)]) for n in range(10)]
    async with open_engine(tmp_path) as engine:
        await engine.load(weights_of(model), version=0)
        first = await generate_all(engine, prompts, Sampling(max_tokens=6))
        following = [np.concatenate([p, a.tokens, prompt_of(9, seed=50)]) for p, a in zip(prompts, first, strict=True)]
        second = await generate_all(engine, following, Sampling(max_tokens=6))
    for prompt, answer in zip(prompts + following, first + second, strict=True):
        expected = hugging_face_logprobs(model, prompt, answer.tokens)
        np.testing.assert_allclose(answer.logprobs, expected, atol=1e-4, rtol=0)


# The Llama models first: a shared server is started anew for every change of shape.
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
async def test_greedy_tokens_and_logprobs_are_those_of_hugging_face(
    kind: str, open_engine: OpenEngine, tmp_path: Path
) -> None:
    model = make_model(kind, tmp_path)
    prompts = [prompt_of(length, seed=length) for length in (1, 2, 7, 30)]
    async with open_engine(tmp_path) as engine:
        await engine.load(weights_of(model), version=0)
        answers = await generate_all(engine, prompts, Sampling(temperature=0, max_tokens=20))
    for prompt, answer in zip(prompts, answers, strict=True):
        np.testing.assert_allclose(
            answer.logprobs, hugging_face_logprobs(model, prompt, answer.tokens), atol=1e-4, rtol=0
        )
        likeliest = [
            int(
                np.argmax(
                    [hugging_face_logprobs(model, prompt, np.append(answer.tokens[:3], t))[-1] for t in range(64)]
                )
            )
        ]
        assert answer.tokens[3] == likeliest[0]
        assert answer.tokens.dtype == np.int32 and answer.logprobs.dtype == np.float32


async def test_sampled_logprobs_are_those_of_hugging_face(open_engine: OpenEngine, tmp_path: Path) -> None:
    model = make_model("qwen3", tmp_path)
    prompts = [prompt_of(5 + seed, seed=seed) for seed in range(12)]
    async with open_engine(tmp_path) as engine:
        await engine.load(weights_of(model), version=0)
        answers = await generate_all(engine, prompts, Sampling(max_tokens=15))
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = hugging_face_logprobs(model, prompt, answer.tokens)
        np.testing.assert_allclose(answer.logprobs, expected, atol=1e-4, rtol=0)
        assert len(answer.tokens) == 15 and answer.stop == "length"


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.7, top_k=5), Sampling(temperature=1.3, top_p=0.8)])
async def test_filtered_logprobs_are_those_of_the_distribution_drawn_from(
    sampling: Sampling, open_engine: OpenEngine, tmp_path: Path
) -> None:
    model = make_model("qwen3", tmp_path)
    prompts = [prompt_of(6, seed=seed) for seed in range(6)]
    async with open_engine(tmp_path) as engine:
        await engine.load(weights_of(model), version=0)
        answers = await generate_all(engine, prompts, sampling.model_copy(update={"max_tokens": 12}))
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = filtered_logprobs(model, prompt, answer.tokens, sampling)
        np.testing.assert_allclose(answer.logprobs, expected, atol=1e-4, rtol=0)


async def test_a_turn_that_extends_its_own_tokens_computes_only_the_new_ones(
    open_engine: OpenEngine, tmp_path: Path
) -> None:
    model = make_model("qwen3", tmp_path)
    prompt = prompt_of(40)
    async with open_engine(tmp_path) as engine:
        await engine.load(weights_of(model), version=0)
        first = await engine.generate(prompt, Sampling(max_tokens=10), deadline_s=PATIENCE_S)
        before = await engine.health()
        following = np.concatenate([prompt, first.tokens, prompt_of(5, seed=1)])
        second = await engine.generate(following, Sampling(max_tokens=10), deadline_s=PATIENCE_S)
        after = await engine.health()
    assert (before.prompt_tokens, before.cached_tokens, after.prompt_tokens) == (40, 0, 40 + 55)
    assert after.cached_tokens == 49  # the key and value of the last sampled token were never needed
    expected = hugging_face_logprobs(model, following, second.tokens)
    np.testing.assert_allclose(second.logprobs, expected, atol=1e-4, rtol=0)


async def test_what_runs_beside_a_request_does_not_change_its_greedy_tokens_or_logprobs(
    open_engine: OpenEngine, tmp_path: Path
) -> None:
    model = make_model("qwen3", tmp_path)
    prompts = [prompt_of(3 + 4 * seed, seed=seed) for seed in range(12)]
    sampling = Sampling(temperature=0, max_tokens=12)
    async with open_engine(tmp_path) as engine:
        await engine.load(weights_of(model), version=0)
        together = await generate_all(engine, prompts, sampling)
        alone = [await engine.generate(p, sampling, deadline_s=PATIENCE_S) for p in prompts]
    for first, second in zip(together, alone, strict=True):
        assert first.tokens.tolist() == second.tokens.tolist()
        np.testing.assert_allclose(first.logprobs, second.logprobs, atol=1e-4, rtol=0)


async def test_a_swap_in_flight_leaves_tokens_of_both_versions_each_with_the_logprob_it_was_drawn_with(
    open_engine: OpenEngine, tmp_path: Path
) -> None:
    await check_swap_in_flight(open_engine, tmp_path)


async def check_swap_in_flight(open_engine: OpenEngine, tmp_path: Path) -> None:
    old, new = make_model("qwen3", tmp_path, seed=0), make_model("qwen3", tmp_path / "new", seed=5)
    prompt = prompt_of(8)
    answers: list[Generation] = []
    async with open_engine(tmp_path) as engine:
        await engine.load(weights_of(old), version=3)

        async def one() -> None:
            answers.append(await engine.generate(prompt, Sampling(max_tokens=CONTEXT), deadline_s=PATIENCE_S))

        with anyio.fail_after(PATIENCE_S):
            for attempt in range(50):  # the request may end before the swap: then try again
                sampled = (await engine.health()).sampled_tokens
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(one)
                    await wait_until_sampled(engine, sampled + 5)
                    report = await engine.load(weights_of((old, new)[(attempt + 1) % 2]), version=4 + attempt)
                if len(set(answers[-1].versions.tolist())) == 2:
                    break
    assert report.digest == weights_digest(weights_of((old, new)[(attempt + 1) % 2])) == engine.digests[4 + attempt]
    answer = answers[-1]
    before, after = ((old, new), (new, old))[attempt % 2]
    count = int((answer.versions == answer.versions[0]).sum())
    assert answer.versions.tolist() == sorted(answer.versions.tolist())
    assert set(answer.versions.tolist()) == {3 + attempt, 4 + attempt}
    whole = np.concatenate([prompt, answer.tokens])
    old_part = hugging_face_logprobs(before, prompt, answer.tokens[:count])
    np.testing.assert_allclose(answer.logprobs[:count], old_part, atol=1e-4, rtol=0)
    split = len(prompt) + count
    if open_engine.recomputes:
        new_part = hugging_face_logprobs(after, whole[:split], whole[split:])
    else:
        new_part = hugging_face_logprobs_after_swap(before, after, whole[:split], whole[split:])
    np.testing.assert_allclose(answer.logprobs[count:], new_part, atol=1e-4, rtol=0)


async def test_a_request_after_a_swap_is_answered_by_the_new_weights_alone(
    open_engine: OpenEngine, tmp_path: Path
) -> None:
    old, new = make_model("qwen3", tmp_path, seed=0), make_model("qwen3", tmp_path / "new", seed=5)
    prompt = prompt_of(40)
    async with open_engine(tmp_path) as engine:
        await engine.load(weights_of(old), version=0)
        await engine.generate(prompt, Sampling(max_tokens=8), deadline_s=PATIENCE_S)
        await engine.load(weights_of(new), version=1)
        answer = await engine.generate(prompt, Sampling(max_tokens=8), deadline_s=PATIENCE_S)
    assert answer.versions.tolist() == [1] * 8
    np.testing.assert_allclose(answer.logprobs, hugging_face_logprobs(new, prompt, answer.tokens), atol=1e-4, rtol=0)


async def test_sampling_ends_at_an_end_token_which_is_kept(open_engine: OpenEngine, tmp_path: Path) -> None:
    model = make_model("qwen3", tmp_path, ends=True)
    async with open_engine(tmp_path) as engine:
        await engine.load(weights_of(model), version=0)
        answers = await generate_all(engine, [prompt_of(4, seed=n) for n in range(40)], Sampling(max_tokens=60))
    stopped = [a for a in answers if a.stop == "stop"]
    assert stopped and all(a.tokens[-1] == END and END not in a.tokens[:-1] for a in stopped)
    assert all(END not in a.tokens and len(a.tokens) == 60 for a in answers if a.stop == "length")


async def test_a_full_context_ends_the_answer(open_engine: OpenEngine, tmp_path: Path) -> None:
    model = make_model("qwen3", tmp_path)
    prompt = prompt_of(90)
    async with open_engine(tmp_path) as engine:
        await engine.load(weights_of(model), version=0)
        answer = await engine.generate(prompt, Sampling(max_tokens=50), deadline_s=PATIENCE_S)
    assert answer.stop == "context" and len(answer.tokens) == CONTEXT - 90
    np.testing.assert_allclose(answer.logprobs, hugging_face_logprobs(model, prompt, answer.tokens), atol=1e-4, rtol=0)


async def test_prompts_that_could_kill_an_engine_are_refused_before_they_reach_it(
    open_engine: OpenEngine, tmp_path: Path
) -> None:
    model = make_model("qwen3", tmp_path)
    async with open_engine(tmp_path) as engine:
        await engine.load(weights_of(model), version=0)
        for tokens, message in (
            (np.array([], dtype=np.int32), "empty"),
            (np.array([1, VOCABULARY], dtype=np.int32), "token 64 is outside the vocabulary of 64"),
            (np.array([-1], dtype=np.int32), "token -1 is outside"),
            (np.zeros(CONTEXT, dtype=np.int32), "context"),
        ):
            with pytest.raises(ValueError, match=message):
                await engine.generate(tokens, Sampling(), deadline_s=PATIENCE_S)
        assert (await engine.health()).sampled_tokens == 0


async def test_a_passed_deadline_is_an_engine_failure_that_says_so(open_engine: OpenEngine, tmp_path: Path) -> None:
    make_model("qwen3", tmp_path)
    async with open_engine(tmp_path) as engine:  # no weights yet: nothing can be sampled
        with pytest.raises(EngineFailure, match=r"within 0\.01 s"):
            await engine.generate(prompt_of(3), Sampling(), deadline_s=0.01)


async def test_a_deadline_in_the_middle_of_an_answer_frees_the_row(open_engine: OpenEngine, tmp_path: Path) -> None:
    model = make_model("qwen3", tmp_path)
    async with open_engine(tmp_path) as engine:
        await engine.load(weights_of(model), version=0)
        with anyio.fail_after(PATIENCE_S):
            async with anyio.create_task_group() as tasks:
                for seed in range(12):
                    tasks.start_soon(expect_too_late, engine, prompt_of(3, seed=seed))
        answer = await engine.generate(prompt_of(3), Sampling(max_tokens=5), deadline_s=PATIENCE_S)
        health = await engine.health()
    assert len(answer.tokens) == 5
    assert (health.running, health.waiting, health.state) == (0, 0, "ready")


async def expect_too_late(engine: Engine, prompt: Tokens) -> None:
    with pytest.raises(EngineFailure, match=r"within 0\.005 s"):
        await engine.generate(prompt, Sampling(max_tokens=CONTEXT), deadline_s=0.005)


async def test_a_cancelled_request_frees_its_row_for_the_next(open_engine: OpenEngine, tmp_path: Path) -> None:
    model = make_model("qwen3", tmp_path)
    async with open_engine(tmp_path) as engine:
        await engine.load(weights_of(model), version=0)
        with anyio.fail_after(PATIENCE_S):
            async with anyio.create_task_group() as tasks:
                for seed in range(30):
                    tasks.start_soon(engine_task, engine, prompt_of(3, seed=seed))
                await wait_until_sampled(engine, 8)
                tasks.cancel_scope.cancel()
        answer = await engine.generate(prompt_of(3), Sampling(max_tokens=5), deadline_s=PATIENCE_S)
        health = await engine.health()
    assert len(answer.tokens) == 5
    assert (health.running, health.waiting, health.state) == (0, 0, "ready")


async def engine_task(engine: Engine, prompt: Tokens) -> None:
    await engine.generate(prompt, Sampling(max_tokens=CONTEXT), deadline_s=PATIENCE_S)


async def test_weights_that_do_not_fit_are_refused_and_the_old_ones_stay(
    open_engine: OpenEngine, tmp_path: Path
) -> None:
    model: PreTrainedModel = make_model("qwen3", tmp_path)
    weights = weights_of(model)
    missing = {name: tensor for name, tensor in weights.items() if name != "model.norm.weight"}
    async with open_engine(tmp_path) as engine:
        await engine.load(weights, version=7)
        with pytest.raises(ValueError, match=r"model\.norm\.weight"):
            await engine.load(missing, version=8)
        assert (engine.version, engine.digests[7]) == (7, weights_digest(weights))


@pytest.mark.timeout(1_500)
async def test_after_a_death_the_same_weights_answer_again(open_engine: OpenEngine, tmp_path: Path) -> None:
    model = make_model("qwen3", tmp_path)
    answers: list[Generation] = []
    failures: list[EngineFailure] = []
    async with open_engine.mortal(tmp_path) as (engine, kill):
        await engine.load(weights_of(model), version=5)

        async def ask() -> None:
            for _ in range(2):  # as an episode does
                try:
                    answers.append(await engine.generate(prompt_of(4), Sampling(max_tokens=CONTEXT), deadline_s=700))
                except EngineFailure as error:
                    failures.append(error)
                else:
                    return

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await wait_until_sampled(engine, 5)
            kill()
        await ask()
        health = await engine.health()
    assert len(failures) == (0 if open_engine.resumes else 1)
    for answer in answers:
        expected = hugging_face_logprobs(model, prompt_of(4), answer.tokens)
        np.testing.assert_allclose(answer.logprobs, expected, atol=1e-4, rtol=0)
        assert answer.versions.tolist() == [5] * (CONTEXT - 4) and answer.stop == "context"
    assert len(answers) == 2 and health.state == "ready"
