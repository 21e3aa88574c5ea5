"""The SGLang engine's side of the interface, against a stub that does what no real server does on demand."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import anyio
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from actors.engines.engine import EngineFailure, Generation
from actors.engines.sglang.answers import BadAnswer, parse_answer, versions_of
from actors.engines.sglang.attestation import Layout, converted, expected_checksums, first_difference
from actors.engines.sglang.client import Request
from actors.engines.sglang.engine import SglangEngine
from actors.engines.sglang.launch import command, environment, gpu_groups
from actors.engines.sglang.model import read_facts
from actors.engines.sglang.progress import Reply
from matpo.config import Sampling
from matpo.config import SglangEngine as Settings
from matpo.errors import UserError
from protocols.weights import Tensor, weights_digest, write_keyframe
from tests.actors.engines.models import make_model, weights_of
from tests.actors.engines.stub import Stub, answer

PROMPT = np.array([40, 41], dtype=np.int32)


LAYOUT = Layout("float32", "cpu", tied=True)


def settings_for(stub: Stub, **options: object) -> Settings:
    basis = Settings(urls=(stub.url,), device="cpu", dtype="float32", max_context_tokens=32)
    return basis.model_copy(update=options)


@pytest.fixture
def model(tmp_path: Path) -> PreTrainedModel:
    return make_model("qwen3", tmp_path)


def sums_of(model: PreTrainedModel) -> dict[str, str]:
    (sums,) = expected_checksums(weights_of(model), LAYOUT)
    return dict(sums)


async def generate(
    stub: Stub, model: PreTrainedModel, folder: Path, settings: Settings, *, max_tokens: int = 5
) -> Generation:
    stub.checksums = sums_of(model)
    async with SglangEngine.open(folder, settings, seed=0) as engine:
        await engine.load(weights_of(model), version=7)
        return await engine.generate(PROMPT, Sampling(max_tokens=max_tokens), deadline_s=20)


@pytest.mark.parametrize("stream_tokens", [0, 1])
async def test_tokens_logprobs_and_versions_arrive_as_the_server_sent_them(
    model: PreTrainedModel, tmp_path: Path, stream_tokens: int
) -> None:
    stub = Stub()
    with anyio.fail_after(30):
        async with stub.serve():
            got = await generate(stub, model, tmp_path, settings_for(stub, stream_tokens=stream_tokens))
    assert (got.tokens.tolist(), got.versions.tolist(), got.stop) == ([1, 2, 3, 4, 5], [7] * 5, "length")
    np.testing.assert_array_equal(got.logprobs, np.full(5, -0.6931472, dtype=np.float32))


async def test_a_reply_that_breaks_off_is_continued_from_the_tokens_that_arrived(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    stub = Stub(break_after=3)
    with anyio.fail_after(30):
        async with stub.serve():
            got = await generate(stub, model, tmp_path, settings_for(stub, stream_tokens=1))
    first, second = stub.asked("/generate")
    assert first["input_ids"] == [40, 41] and second["input_ids"] == [40, 41, 1, 2, 3]
    assert got.tokens.tolist() == [1, 2, 3, 1, 2] and got.versions.tolist() == [7] * 5


async def test_every_sampling_option_is_given_and_ids_have_one_length(model: PreTrainedModel, tmp_path: Path) -> None:
    bodies = []
    kinds = (
        Sampling(temperature=0, top_p=0.5, top_k=3),
        Sampling(top_p=0.5, top_k=3),
        Sampling(),
        Sampling(top_p=0.5),
        Sampling(top_k=5_000),
    )
    for sampling in kinds:
        request = Request("a" * 32, PROMPT, sampling, max_tokens=4, ends=(63,), cache_key="k", stream_tokens=0)
        bodies.append(json.loads(request.body()))
    greedy, filtered, plain, nucleus, wide = (body["sampling_params"] for body in bodies)
    assert (greedy["top_p"], greedy["top_k"], plain["top_p"], plain["top_k"]) == (1.0, -1, 1.0, -1)
    assert (filtered["top_p"], filtered["top_k"], filtered["stop_token_ids"]) == (0.5, 3, [63])
    assert (nucleus["top_k"], wide["top_k"]) == (4096, 4096)  # more the server refuses
    assert [body["return_sampling_mask"] for body in bodies] == [False, True, False, True, True]
    assert set(greedy) >= {"min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "ignore_eos"}


async def test_a_cancelled_request_is_aborted_by_its_own_id(model: PreTrainedModel, tmp_path: Path) -> None:
    stub = Stub(hang=True)
    stub.checksums = sums_of(model)
    with anyio.fail_after(30):
        async with stub.serve(), SglangEngine.open(tmp_path, settings_for(stub), seed=0) as engine:
            await engine.load(weights_of(model), version=0)
            with pytest.raises(EngineFailure, match=r"within 0\.5 s"):
                await engine.generate(PROMPT, Sampling(), deadline_s=0.5)
            health = await engine.health()
    assert [body["rid"] for body in stub.asked("/abort_request")] == [stub.asked("/generate")[0]["rid"]]
    assert (health.running, health.waiting) == (0, 0)


async def test_weights_the_server_did_not_really_load_are_not_vouched_for(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    stub = Stub()
    stub.checksums = {**sums_of(model), "model.norm.weight": "0" * 16}
    with anyio.fail_after(30):
        async with stub.serve(), SglangEngine.open(tmp_path, settings_for(stub), seed=0) as engine:
            with pytest.raises(EngineFailure, match=r"model\.norm\.weight on rank 0 is not that of version 4"):
                await engine.load(weights_of(model), version=4)
            assert engine.version == -1
            stub.checksums = sums_of(model)
            report = await engine.load(weights_of(model), version=4)
    assert report.digest == weights_digest(weights_of(model))
    assert stub.requests[-1][0] == "/continue_generation"


async def test_weights_that_lie_in_a_file_nearby_are_handed_over_without_being_written(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    stub, weights = Stub(checksums=sums_of(model)), weights_of(model)
    file = tmp_path / "shadow" / "weights.safetensors"
    file.parent.mkdir()
    write_keyframe(file, weights, version=4)
    with anyio.fail_after(30):
        async with stub.serve():
            settings = settings_for(stub, scratch=tmp_path)
            async with SglangEngine.open(tmp_path, settings, seed=0) as engine:
                await engine.load(weights, version=4, file=file)
                (update,) = stub.asked("/update_weights_from_disk")
                assert (Path(str(update["model_path"])) / "model.safetensors").samefile(file)


async def test_a_server_that_cannot_be_started_says_why(model: PreTrainedModel, tmp_path: Path) -> None:
    settings = Settings(python="/bin/false", device="cpu", max_context_tokens=32)
    with (
        anyio.fail_after(30),
        pytest.raises(UserError, match=r"sglang server 0 did not start: server ended with status 1"),
    ):
        async with SglangEngine.open(tmp_path, settings, seed=0, log=tmp_path / "log"):
            pass


def test_a_context_beyond_the_models_positions_and_a_folder_without_weights_are_refused(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no \.safetensors file"):
        read_facts(tmp_path)


def test_a_server_is_bound_to_this_machine_only(tmp_path: Path) -> None:
    line = command(tmp_path, Settings(python="py", arguments=("--x",)), port=31_000, seed=3)
    assert line[:3] == ["py", "-m", "sglang.launch_server"] and line[-1] == "--x"
    assert line[line.index("--host") + 1] == "127.0.0.1"


def test_gpus_are_given_out_in_order_or_as_told_and_counted_among_those_visible() -> None:
    two = Settings(servers=2, tensor_parallel=2)
    assert gpu_groups(two, None) == ["0,1", "2,3"]
    assert gpu_groups(two, "4,5,GPU-a,GPU-b") == ["4,5", "GPU-a,GPU-b"]
    assert gpu_groups(Settings(servers=2, gpus=((3,), (0,))), "4,5,6,7") == ["7", "4"]
    assert gpu_groups(Settings(servers=2, device="cpu"), "0") == [None, None]
    with pytest.raises(UserError, match="needs GPU 3 for 2 servers of 2 ranks, but CUDA_VISIBLE_DEVICES = '0,1,2'"):
        gpu_groups(two, "0,1,2")
    assert environment(two, gpus="4,5")["CUDA_VISIBLE_DEVICES"] == "4,5"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not json", "cannot be read"),
        (b'{"output_ids": [1]}', "meta_info"),
        (json.dumps({**answer(1, 2, "0", finished=True), "output_ids": [1, 9]}).encode(), "log-probabilities"),
    ],
)
def test_a_reply_that_is_not_what_was_promised_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(BadAnswer, match=message):
        parse_answer(content, filtered=False)


@pytest.mark.parametrize("unsent", [0, 2])
def test_the_last_event_of_an_aborted_stream_repeats_no_token(unsent: int) -> None:
    sent = answer(1, 4, "3", finished=False)
    echo = answer(1, 4 + unsent, "3", finished=False)
    meta, ids = echo["meta_info"], echo["output_ids"]
    assert isinstance(meta, dict) and isinstance(ids, list)
    echo["output_ids"] = ids[-1:]
    meta["finish_reason"] = {"type": "abort", "message": "Abort in waiting queue"}
    meta["output_token_logprobs"] = [[-0.6931472, token, None] for token in ids[4:]]
    reply = Reply(sent_with=3, to_the_end=False)
    for event in (sent, echo):
        reply.take(parse_answer(json.dumps(event).encode(), filtered=False))
    assert reply.count == 4 + unsent
    assert reply.last.finish == "abort"


def test_versions_come_from_the_spans_and_a_gap_is_refused() -> None:
    reply = answer(1, 4, "3", finished=True)
    meta = reply["meta_info"]
    assert isinstance(meta, dict)
    meta["weight_versions"] = [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 4}]
    parsed = parse_answer(json.dumps(reply).encode(), filtered=False)
    assert versions_of(parsed, 4, before=3, after=4).tolist() == [3, 4, 4, 4]
    with pytest.raises(BadAnswer, match="do not cover 5 tokens"):
        versions_of(parsed, 5, before=3, after=4)


def test_number_formats_are_converted_as_torch_converts_them() -> None:
    values = torch.randn(1_000, generator=torch.Generator().manual_seed(0)).reshape(10, 100)
    rounded = converted(Tensor("float32", values.numpy()), "bfloat16")
    np.testing.assert_array_equal(rounded.data, values.bfloat16().view(torch.uint16).numpy())
    np.testing.assert_array_equal(converted(rounded, "float32").data, values.bfloat16().float().numpy())


def test_checksums_are_those_of_the_fused_and_padded_tensors() -> None:
    tensors = {
        f"l.{name}_proj.weight": Tensor("float32", np.full((2, 2), value, dtype=np.float32))
        for value, name in enumerate(("q", "k", "v", "up", "gate"))
    }
    embedding = np.ones((3, 2), dtype=np.float32)
    weights = {**tensors, "model.embed_tokens.weight": Tensor("float32", embedding)}
    (sums,) = expected_checksums(weights, LAYOUT)
    qkv = np.repeat(np.arange(3, dtype=np.float32), 4).tobytes()
    gate_up = np.repeat(np.array([4, 3], dtype=np.float32), 4).tobytes()
    assert sums["l.qkv_proj.weight"] == hashlib.sha256(qkv).hexdigest()[:16]
    assert sums["l.gate_up_proj.weight"] == hashlib.sha256(gate_up).hexdigest()[:16]
    padded = embedding.tobytes() + bytes(61 * 2 * 4)  # 64 rows
    assert sums["model.embed_tokens.weight"] == hashlib.sha256(padded).hexdigest()[:16]
    assert first_difference(sums, {k: v for k, v in sums.items() if k != "lm_head.weight"}, LAYOUT) is None
    assert first_difference(sums, {**sums, "new": "0"}, LAYOUT) == "new"
    assert first_difference(sums, {**sums, "new": "0"}, Layout("float32", "cuda", tied=True)) is None
    with pytest.raises(ValueError, match="attest = false"):
        first_difference(sums, {"new": "0"}, Layout("float32", "cuda", tied=True))
