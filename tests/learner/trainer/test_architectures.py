"""Which architectures share prefixes exactly, which are refused with the reason, and what serves those."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from learner.trainer.attention.choice import choose_attention
from learner.trainer.model import Policy
from learner.trainer.pack import pack
from learner.trainer.step import accumulate
from matpo.attention_config import AttentionChoice
from matpo.config import Learner, Tis
from matpo.errors import UserError
from tests.learner.trainer.models import VOCABULARY, reference_gradient
from tests.learner.trainer.test_exactness import CPU, random_rows, relative_difference

SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": None,
}
WINDOWED = {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}


def build(model_class: type[PreTrainedModel], config_class: type, **more: object) -> PreTrainedModel:
    torch.manual_seed(0)
    model = model_class(config_class(**SHAPE | more))
    model.set_attn_implementation("eager")
    return model


def mistral() -> PreTrainedModel:
    return build(MistralForCausalLM, MistralConfig, sliding_window=4)


def qwen3() -> PreTrainedModel:
    return build(Qwen3ForCausalLM, Qwen3Config, use_sliding_window=True, **WINDOWED)


def gemma3() -> PreTrainedModel:
    return build(Gemma3ForCausalLM, Gemma3TextConfig, query_pre_attn_scalar=8, **WINDOWED)


def granite() -> PreTrainedModel:
    return build(GraniteForCausalLM, GraniteConfig, logits_scaling=2.0)


def mixture_of_experts() -> PreTrainedModel:
    return build(Qwen3MoeForCausalLM, Qwen3MoeConfig, **EXPERTS)


def gemma2() -> PreTrainedModel:
    return build(Gemma2ForCausalLM, Gemma2Config, final_logit_softcapping=None)


def gpt_oss() -> PreTrainedModel:
    return build(GptOssForCausalLM, GptOssConfig, num_local_experts=4, num_experts_per_tok=2, **WINDOWED)


def linear_hybrid() -> PreTrainedModel:
    linear = {
        "linear_num_value_heads": 2, "linear_num_key_heads": 1, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 2, "shared_expert_intermediate_size": 8,
    }  # fmt: skip
    layers = ["linear_attention", "full_attention"]
    return build(Qwen3NextForCausalLM, Qwen3NextConfig, layer_types=layers, **EXPERTS, **linear)


def assert_exact(model: PreTrainedModel, attention: AttentionChoice, tolerance: float = 1e-5) -> None:
    rows = random_rows(12, seed=9)
    _, expected = reference_gradient(model, rows, Tis())
    policy = Policy.of(model, Learner(attention=attention))
    accumulate(policy, pack(rows, limit_tokens=1000, device=CPU), Tis())
    found = {name: p.grad for name, p in policy.parameters.items() if p.grad is not None}
    assert relative_difference(found, expected) < tolerance


@pytest.mark.parametrize("model", [mistral, qwen3, gemma3, granite, mixture_of_experts])
def test_prefixes_are_shared_exactly_over_windows_mixed_layers_scaled_logits_and_experts(model: type) -> None:
    assert_exact(model(), "auto")


@pytest.mark.parametrize(
    ("model", "reason"),
    [(gemma2, r"softcap=50"), (gpt_oss, "attention sinks True"), (linear_hybrid, "hidden states then differ by")],
)
def test_what_cannot_share_prefixes_is_refused_with_the_reason_and_trained_packed(model: type, reason: str) -> None:
    with pytest.raises(UserError, match=f'cannot share prefixes: .*{reason}.*; learner.attention = "packed"'):
        Policy.of(model(), Learner())
    assert_exact(model(), "packed")


def test_a_model_that_caps_its_logits_is_refused_either_way() -> None:
    for attention in ("auto", "packed"):
        with pytest.raises(UserError, match="cannot be trained: its logits differ by"):
            capped = build(Gemma2ForCausalLM, Gemma2Config, initializer_range=3.0, final_logit_softcapping=1.0)
            Policy.of(capped, Learner.model_validate({"attention": attention}))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"attention": "flex"}, 'learner.attention = "flex" needs a GPU, and learner.device is \'cpu\'; set'),
        ({"attention": "varlen"}, 'learner.attention = "varlen" needs a GPU'),
        ({"attention": "rectangle", "device": "cuda:1"}, '"rectangle" runs on the CPU, and'),
        ({"attention": "varlen", "device": "cuda"}, 'set learner.dtype = "bfloat16"'),
    ],
)  # fmt: skip
def test_a_way_that_cannot_run_on_the_device_is_refused(settings: dict[str, str], reason: str) -> None:
    with pytest.raises(ValueError, match="Value error") as error:
        Learner.model_validate(settings)
    assert reason in str(error.value)


def test_the_cpu_computes_rectangles_and_a_device_without_a_kernel_is_told_to_pack() -> None:
    assert choose_attention(Learner()) == "rectangle"
    assert choose_attention(Learner(attention="packed", device="mps")) == "packed"
    with pytest.raises(UserError, match=r"'mps' has no kernel .* set learner.attention = \"packed\""):
        choose_attention(Learner(device="mps"))
