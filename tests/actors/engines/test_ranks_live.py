"""A real SGLang server of two ranks, with experts: every rank's weights are checked, however they came."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from actors.engines.folder import read_model_weights
from actors.engines.sglang.engine import SglangEngine
from matpo.config import Sampling
from matpo.config import SglangEngine as Settings
from protocols.weights import weights_digest
from tests.actors.engines.conftest import CONTEXT
from tests.actors.engines.models import hugging_face_logprobs, prompt_of
from tests.actors.engines.servers import PYTHON, SharedServer
from tests.actors.engines.test_contract import generate_all

pytestmark = pytest.mark.sglang


def mixture(folder: Path, *, seed: int) -> PreTrainedModel:
    """Two layers of four experts."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=False,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(folder)
    return model


@pytest.mark.timeout(1_500)
async def test_both_ranks_hold_what_they_were_given_by_disk_and_by_broadcast(
    server: SharedServer, tmp_path: Path
) -> None:
    server.stop()
    models = [mixture(tmp_path / str(seed), seed=seed) for seed in range(3)]
    weights = [read_model_weights(tmp_path / str(seed)) for seed in range(3)]
    disk = Settings(
        python=str(PYTHON), device="cpu", dtype="float32", max_batch=4, max_context_tokens=CONTEXT, tensor_parallel=2
    )
    async with SglangEngine.open(tmp_path / "0", disk, seed=0, log=tmp_path / "log") as engine:
        (held_by,) = engine.fleet.servers.values()
        collective = disk.model_copy(update={"handover": "collective", "urls": (held_by.client.url,)})
        async with SglangEngine.open(tmp_path / "0", collective, seed=0, log=tmp_path / "log2") as other:
            for version, holder in ((1, engine), (2, other)):
                report = await holder.load(weights[version], version=version)
                assert report.digest == weights_digest(weights[version])
                prompts = [prompt_of(6, seed=seed) for seed in range(4)]
                for prompt, answer in zip(
                    prompts, await generate_all(holder, prompts, Sampling(max_tokens=8)), strict=True
                ):
                    expected = hugging_face_logprobs(models[version], prompt, answer.tokens)
                    np.testing.assert_allclose(answer.logprobs, expected, atol=1e-4, rtol=0)
                    assert answer.versions.tolist() == [version] * 8
            held = await held_by.client.checksums(deadline_s=60)
        assert [rank.rank for rank in held] == [0, 1]
        assert held[0].checksums != held[1].checksums
