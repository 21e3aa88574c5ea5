"""What only a real SGLang server can show: every kind of swap, filters together, whole replies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from matpo.config import Sampling
from tests.actors.engines.conftest import OpenEngine
from tests.actors.engines.models import (
    filtered_logprobs,
    hugging_face_logprobs,
    make_model,
    prompt_of,
    weights_of,
)
from tests.actors.engines.test_contract import check_swap_in_flight, generate_all

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


async def test_with_top_k_and_top_p_together_top_p_counts_over_the_whole_distribution(
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
