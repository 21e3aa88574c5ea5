"""What is particular to the embedded engine: its cache, its number formats, the models it refuses."""

from __future__ import annotations

import copy
from pathlib import Path

import anyio
import numpy as np
import orjson
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from actors.engines.embedded.architecture import read_architecture, read_end_tokens
from actors.engines.embedded.cache import NO_MATCH, Match, Parked, longest_prefix
from actors.engines.embedded.decoder import Piece, groups
from actors.engines.embedded.engine import EmbeddedEngine
from actors.engines.embedded.parameters import load_parameters
from actors.engines.engine import EngineFailure, Generation
from actors.engines.folder import read_model_weights
from matpo.config import EmbeddedEngine as Settings
from matpo.config import Sampling
from matpo.errors import UserError
from protocols.records import Tokens
from protocols.weights import Tensor, Weights, weights_digest
from tests.actors.engines.models import END, hugging_face_logprobs, make_model, prompt_of, weights_of
from tests.actors.engines.test_contract import wait_until_sampled


def tokens_of(*values: int) -> Tokens:
    return np.array(values, dtype=np.int32)


def rounded(weights: Weights) -> Weights:
    """The weights in bfloat16."""
    return {
        name: Tensor("bfloat16", torch.from_numpy(t.data).to(torch.bfloat16).view(torch.uint16).numpy())
        for name, t in weights.items()
    }


def test_the_longest_common_prefix_wins_and_never_covers_the_last_token() -> None:
    known = np.array([[1, 2, 3, 9, 0], [1, 2, 3, 4, 5], [1, 9, 9, 9, 9]], dtype=np.int32)
    lengths = np.array([4, 5, 5])
    assert longest_prefix(known, lengths, tokens_of(1, 2, 3, 4, 5, 6)) == Match(1, 5, whole=True)
    assert longest_prefix(known, lengths, tokens_of(1, 2, 3, 4, 5)) == Match(1, 4, whole=False)
    assert longest_prefix(known, lengths, tokens_of(1, 2, 8)) == Match(0, 2, whole=False)
    assert longest_prefix(known, lengths, tokens_of(7, 2)) == NO_MATCH
    assert longest_prefix(known, lengths, tokens_of(1)) == NO_MATCH


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=5), st.data())
def test_a_prefix_found_is_as_long_as_the_longest_there_is(rows: list[list[int]], data: st.DataObject) -> None:
    prompt = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=8))
    table = np.full((len(rows), 6), -1, dtype=np.int32)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    shared = [
        next(
            (n for n, (a, b) in enumerate(zip(row, prompt[:-1], strict=False)) if a != b),
            min(len(row), len(prompt) - 1),
        )
        for row in rows
    ]
    assert longest_prefix(table, np.array([len(r) for r in rows]), tokens_of(*prompt)).length == max(shared)


def test_parked_sequences_make_room_oldest_first_and_a_sequence_that_was_continued_is_given_up() -> None:
    parked = Parked(entries=3, context=8, budget_tokens=9)
    values = torch.zeros(1, 8, 1)
    parked.add(tokens_of(1, 1, 1), values)
    parked.add(tokens_of(2, 2, 2), values)
    parked.use(parked.find(tokens_of(1, 1, 5)))  # used in part: kept, and now the newest
    parked.add(tokens_of(3, 3, 3, 3), values)
    assert parked.find(tokens_of(2, 2, 2, 2)) == NO_MATCH
    match = parked.find(tokens_of(1, 1, 1, 4))
    assert match.whole and match.length == 3
    parked.use(match)
    assert parked.find(tokens_of(1, 1, 1, 4)) == NO_MATCH and len(parked) == 1
    parked.clear()
    assert len(parked) == 0 and parked.find(tokens_of(3, 3, 3)) == NO_MATCH


def test_a_sequence_beyond_the_budget_is_not_parked() -> None:
    parked = Parked(entries=2, context=8, budget_tokens=3)
    parked.add(tokens_of(1, 2, 3, 4), torch.zeros(1, 8, 1))
    assert len(parked) == 0


def test_a_long_prompt_is_not_padded_together_with_short_ones() -> None:
    pieces = [Piece(row, 0, np.zeros(n, dtype=np.int32)) for row, n in enumerate((0, 3, 4, 2, 1, 500, 3, 0))]
    found = [[len(p.tokens) for p in group] for group in groups(pieces)]
    assert found == [[0, 3, 4, 2, 1], [500, 3, 0]]  # 6 · 500 > 4 · 510, but 3 · 500 < 4 · 503
    assert list(groups([Piece(0, 5, np.zeros(0, dtype=np.int32))])) == []


async def test_long_and_short_prompts_of_one_round_stay_exact(tmp_path: Path) -> None:
    model = make_model("qwen3", tmp_path)
    lengths = (2, 80, 3, 1, 60, 2)
    prompts = [np.random.default_rng(n).integers(0, END, n).astype(np.int32) for n in lengths]
    async with EmbeddedEngine.open(tmp_path, Settings(max_batch=8, max_context_tokens=96), seed=0) as engine:
        answers: dict[int, tuple[Tokens, np.ndarray[tuple[int], np.dtype[np.float32]]]] = {}

        async def one(index: int) -> None:
            answer = await engine.generate(prompts[index], Sampling(max_tokens=4), deadline_s=60)
            answers[index] = answer.tokens, answer.logprobs

        async with anyio.create_task_group() as tasks:
            for index in range(len(prompts)):
                tasks.start_soon(one, index)
            await anyio.wait_all_tasks_blocked()
            await engine.load(weights_of(model), version=0)  # all were waiting: one round admits them together
    for index, prompt in enumerate(prompts):
        tokens, logprobs = answers[index]
        np.testing.assert_allclose(logprobs, hugging_face_logprobs(model, prompt, tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_the_digest_is_read_back_from_what_was_loaded(kind: str, tmp_path: Path) -> None:
    weights = weights_of(make_model(kind, tmp_path))
    architecture = read_architecture(tmp_path)
    for published, dtype in (
        (weights, torch.float32),
        (rounded(weights), torch.float32),
        (rounded(weights), torch.bfloat16),
    ):
        loaded = load_parameters(architecture, published, device=torch.device("cpu"), dtype=dtype)
        assert loaded.digest == weights_digest(published)
    received = load_parameters(architecture, weights, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert received.digest == weights_digest(weights)  # rounding cannot be undone: that of what was received


async def test_a_bfloat16_engine_is_as_close_to_the_float32_model_as_hugging_face_in_bfloat16(
    device: str, tmp_path: Path
) -> None:
    model = make_model("qwen3", tmp_path)
    settings = Settings(device=device, dtype="bfloat16", max_context_tokens=64)
    async with EmbeddedEngine.open(tmp_path, settings, seed=0) as engine:
        await engine.load(rounded(weights_of(model)), version=0)
        answers = [await engine.generate(prompt_of(20, seed=n), Sampling(), deadline_s=60) for n in range(4)]
    exact, coarse = (
        np.concatenate([hugging_face_logprobs(m, prompt_of(20, seed=n), a.tokens) for n, a in enumerate(answers)])
        for m in (model, copy.deepcopy(model).bfloat16())
    )
    ours = np.concatenate([answer.logprobs for answer in answers])
    assert 0 < np.abs(ours - exact).mean() < 1.5 * np.abs(coarse - exact).mean()


def test_the_weights_of_a_folder_are_those_of_the_model(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path)
    assert weights_digest(read_model_weights(tmp_path)) == weights_digest(weights_of(model))
    with pytest.raises(UserError, match="safetensors"):
        read_model_weights(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen3_moe"}, r"model_type = 'qwen3_moe'.*llama, qwen2 and qwen3"),
        ({"model_type": "gemma3_text"}, "model_type = 'gemma3_text'"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "'fp8'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ],
)
def test_a_model_that_cannot_be_run_is_refused_by_name(change: dict[str, object], message: str, tmp_path: Path) -> None:
    make_model("qwen3", tmp_path)
    file = tmp_path / "config.json"
    file.write_bytes(orjson.dumps(orjson.loads(file.read_bytes()) | change))
    with pytest.raises(UserError, match=message) as refusal:
        read_architecture(tmp_path)
    assert str(refusal.value).endswith('for others set actor.engine.kind = "sglang"')


def test_a_context_beyond_the_models_positions_is_refused(tmp_path: Path) -> None:
    make_model("qwen3", tmp_path)
    assert read_architecture(tmp_path, context=256).max_position_embeddings == 256
    with pytest.raises(UserError, match=r"max_context_tokens = 257, but .* has only 256 positions"):
        read_architecture(tmp_path, context=257)


def test_end_tokens_come_from_the_generation_config_first(tmp_path: Path) -> None:
    make_model("qwen3", tmp_path, ends=True)
    architecture = read_architecture(tmp_path)
    (tmp_path / "generation_config.json").write_bytes(orjson.dumps({"eos_token_id": [5, 6]}))
    assert read_end_tokens(tmp_path, architecture) == (5, 6)
    (tmp_path / "generation_config.json").unlink()
    assert read_end_tokens(tmp_path, architecture) == (END,)


async def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    make_model("qwen3", tmp_path)
    with pytest.raises(UserError, match=r"'cuda:99' cannot be used"):
        async with EmbeddedEngine.open(tmp_path, Settings(device="cuda:99", max_context_tokens=64), seed=0):
            pass


async def test_more_memory_than_there_is_is_refused_naming_the_options(tmp_path: Path) -> None:
    make_model("qwen3", tmp_path)
    with pytest.raises(UserError, match=r"max_batch = 10000000000 .*lower one of them"):
        async with EmbeddedEngine.open(tmp_path, Settings(max_batch=10**10, max_context_tokens=64), seed=0):
            pass


async def play_greedily(folder: Path, settings: Settings, model: PreTrainedModel) -> tuple[list[Generation], float]:
    """Eight episodes of one group, three turns each: all answers, and the share of prompt tokens that was reused."""
    answers: dict[tuple[int, int], Generation] = {}

    async def play(engine: EmbeddedEngine, seed: int) -> None:
        tokens = np.concatenate([prompt_of(20), prompt_of(1, seed=seed)])
        for turn in range(3):
            answer = await engine.generate(tokens, Sampling(temperature=0, max_tokens=5), deadline_s=60)
            answers[seed, turn] = answer
            tokens = np.concatenate([tokens, answer.tokens, prompt_of(7, seed=100 + seed * 3 + turn)])

    async with EmbeddedEngine.open(folder, settings, seed=0) as engine:
        await engine.load(weights_of(model), version=0)
        async with anyio.create_task_group() as tasks:
            for seed in range(8):
                tasks.start_soon(play, engine, seed)
        health = await engine.health()
    assert health.prompt_tokens == 8 * (21 + 33 + 45)
    return [answers[key] for key in sorted(answers)], health.cached_tokens / health.prompt_tokens


async def test_logprobs_with_reused_prefixes_are_those_of_a_fresh_prefill(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path)
    settings = Settings(max_batch=4, max_context_tokens=96)
    expected, share = await play_greedily(tmp_path, settings.model_copy(update={"prefix_cache_tokens": 0}), model)
    assert share == 0
    shares = []
    for kept in (None, 90):  # 90 tokens: entries are given up early
        answers, share = await play_greedily(tmp_path, settings.model_copy(update={"prefix_cache_tokens": kept}), model)
        for answer, fresh in zip(answers, expected, strict=True):
            assert answer.tokens.tolist() == fresh.tokens.tolist()
            np.testing.assert_allclose(answer.logprobs, fresh.logprobs, atol=1e-5, rtol=0)
        shares.append(share)
    assert shares[0] > shares[1] > 0.3 and shares[0] > 0.6


async def test_keys_and_values_of_older_weights_are_never_taken_over_even_from_a_row_that_runs(tmp_path: Path) -> None:
    models = make_model("qwen3", tmp_path, seed=0), make_model("qwen3", tmp_path / "new", seed=5)
    prompt = prompt_of(40)
    running: list[Generation] = []

    async def run_on(engine: EmbeddedEngine) -> None:
        running.append(await engine.generate(prompt, Sampling(max_tokens=216), deadline_s=60))

    async with EmbeddedEngine.open(tmp_path, Settings(max_batch=2, max_context_tokens=256), seed=0) as engine:
        await engine.load(weights_of(models[0]), version=0)
        for version in range(1, 50):  # the running request may end before the swap: then try again
            sampled = (await engine.health()).sampled_tokens
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(run_on, engine)
                await wait_until_sampled(engine, sampled + 1)
                await engine.load(weights_of(models[version % 2]), version=version)
                before = (await engine.health()).cached_tokens
                fresh = await engine.generate(prompt, Sampling(max_tokens=5), deadline_s=60)
                after = (await engine.health()).cached_tokens
            if version in running[-1].versions:
                break
    assert set(running[-1].versions.tolist()) == {version - 1, version}
    assert before == after and fresh.versions.tolist() == [version] * 5
    expected = hugging_face_logprobs(models[version % 2], prompt, fresh.tokens)
    np.testing.assert_allclose(fresh.logprobs, expected, atol=1e-4, rtol=0)


async def test_a_prompt_that_waits_for_its_neighbours_keys_is_not_overtaken(tmp_path: Path) -> None:
    model = make_model("qwen3", tmp_path)
    start = prompt_of(40)
    ended: list[str] = []

    async def ask(name: str, prompt: Tokens, count: int) -> None:
        await engine.generate(prompt, Sampling(max_tokens=count), deadline_s=60)
        ended.append(name)

    async with EmbeddedEngine.open(tmp_path, Settings(max_batch=2, max_context_tokens=96), seed=0) as engine:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, "first of the group", start, 50)
            tasks.start_soon(ask, "second of the group", start, 3)
            tasks.start_soon(ask, "stranger", prompt_of(9, seed=1), 3)
            await anyio.wait_all_tasks_blocked()
            await engine.load(weights_of(model), version=0)  # all were waiting, for two rows
        health = await engine.health()
    assert ended == ["second of the group", "stranger", "first of the group"]
    assert health.cached_tokens == 39


async def test_a_round_that_fails_costs_its_requests_and_leaves_nothing_behind(tmp_path: Path) -> None:
    model = make_model("qwen3", tmp_path)
    good = weights_of(model)
    spoiled = {name: Tensor("float32", np.full_like(tensor.data, np.nan)) for name, tensor in good.items()}
    prompt = prompt_of(30)
    async with EmbeddedEngine.open(tmp_path, Settings(max_batch=2, max_context_tokens=64), seed=0) as engine:
        await engine.load(spoiled, version=7)
        for _ in range(2):
            with pytest.raises(EngineFailure, match=r"version 7 on cpu: .* not all finite"):
                await engine.generate(prompt, Sampling(max_tokens=4), deadline_s=60)
        assert (await engine.health()).state == "failed"
        await engine.load(good, version=8)
        answer = await engine.generate(prompt, Sampling(max_tokens=4), deadline_s=60)
        health = await engine.health()
    assert answer.versions.tolist() == [8] * 4
    np.testing.assert_allclose(answer.logprobs, hugging_face_logprobs(model, prompt, answer.tokens), atol=1e-4, rtol=0)
    assert (health.state, health.running, health.waiting) == ("ready", 0, 0)


async def test_an_engine_that_fails_three_times_in_a_row_ends(tmp_path: Path) -> None:
    good = weights_of(make_model("qwen3", tmp_path))
    spoiled = {name: Tensor("float32", np.full_like(tensor.data, np.nan)) for name, tensor in good.items()}
    failures = []
    with pytest.RaisesGroup(pytest.RaisesExc(EngineFailure, match=r"failed 3 times in a row; version 7")):
        async with EmbeddedEngine.open(tmp_path, Settings(max_context_tokens=64), seed=0) as engine:
            await engine.load(spoiled, version=7)
            while True:
                try:
                    await engine.generate(prompt_of(3), Sampling(), deadline_s=60)
                except EngineFailure as error:
                    failures.append(error)
    assert len(failures) == 2
