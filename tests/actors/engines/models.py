"""Tiny random models, saved as Hugging Face folders, and what transformers says about them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoConfig, DynamicCache, LlamaForCausalLM, PreTrainedModel, Qwen3ForCausalLM

from matpo.config import Lora, Sampling
from protocols.records import Floats, Tokens
from protocols.weights import Tensor, Weights

VOCABULARY = 64
END = 63


def make_model(kind: str, folder: Path, *, seed: int = 0, ends: bool = False) -> PreTrainedModel:
    """A two-layer model of the kind, written to `folder`. Weights are wide enough for logits to differ clearly."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        kind,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=kind == "qwen3",
        attention_bias=kind == "llama",
        eos_token_id=END if ends else None,
        bos_token_id=None,
        pad_token_id=None,
    )
    build: Callable[..., PreTrainedModel] = Qwen3ForCausalLM if kind == "qwen3" else LlamaForCausalLM
    model = build(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
    model.save_pretrained(folder)
    return model


def prompt_of(length: int, *, seed: int = 0) -> Tokens:
    """Random tokens, none of them END."""
    return np.random.default_rng(seed).integers(0, END, length).astype(np.int32)


def weights_of(model: PreTrainedModel) -> Weights:
    """The parameters as they travel, in float32."""
    return {name: Tensor("float32", p.detach().numpy().copy()) for name, p in model.named_parameters()}


def adapt(model: PreTrainedModel, lora: Lora, *, seed: int) -> PeftModel:
    """PEFT's adapter in a model of its own, with random factors large enough for logits to differ clearly."""
    torch.manual_seed(seed)
    config = LoraConfig(r=lora.rank, lora_alpha=int(lora.alpha), target_modules=list(lora.target_modules))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a property under its old name
        adapted = get_peft_model(copy.deepcopy(model), config)
    assert isinstance(adapted, PeftModel)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return adapted


def adapter_of(adapted: PeftModel) -> Weights:
    """The factors as they travel, under PEFT's names."""
    return {name: Tensor("float32", t.numpy().copy()) for name, t in get_peft_model_state_dict(adapted).items()}


def hugging_face_logprobs(model: PreTrainedModel | PeftModel, prompt: Tokens, sampled: Tokens) -> Floats:
    """log p of each sampled token given everything before it, from one plain forward pass."""
    whole = torch.from_numpy(np.concatenate([prompt, sampled]).astype(np.int64))[None]
    with torch.no_grad():
        logp = torch.log_softmax(model(whole).logits[0].float(), dim=-1)
    picked = logp[len(prompt) - 1 : -1].gather(1, whole[0, len(prompt) :, None])
    return np.asarray(picked[:, 0].numpy(), dtype=np.float32)


def hugging_face_logprobs_after_swap(
    old: PreTrainedModel, new: PreTrainedModel, before: Tokens, after: Tokens
) -> Floats:
    """log p under `new` of each token of `after`, with the keys and values of `before[:-1]` computed by `old`."""
    cache = DynamicCache()
    picked = []
    with torch.no_grad():
        old(torch.from_numpy(before[:-1].astype(np.int64))[None], past_key_values=cache)
        last = int(before[-1])
        for token in after:
            logits = new(torch.tensor([[last]]), past_key_values=cache).logits[0, -1]
            picked.append(float(torch.log_softmax(logits.float(), dim=-1)[int(token)]))
            last = int(token)
    return np.asarray(picked, dtype=np.float32)


def filtered_logprobs(model: PreTrainedModel, prompt: Tokens, sampled: Tokens, sampling: Sampling) -> Floats:
    """log μ after temperature, then top-k, then top-p over the whole distribution, renormalised."""
    whole = torch.from_numpy(np.concatenate([prompt, sampled]).astype(np.int64))[None]
    with torch.no_grad():
        p_TV = torch.softmax(model(whole).logits[0, len(prompt) - 1 : -1].double() / sampling.temperature, dim=-1)
    sorted_TV, order_TV = p_TV.sort(dim=-1, descending=True)
    before_TV = sorted_TV.cumsum(dim=-1) - sorted_TV
    kept_TV = (torch.arange(p_TV.shape[1]) < (sampling.top_k or p_TV.shape[1])) & (before_TV <= sampling.top_p)
    kept_TV = torch.zeros_like(kept_TV).scatter(1, order_TV, kept_TV)
    p_TV = torch.where(kept_TV, p_TV, 0.0)
    p_TV /= p_TV.sum(dim=-1, keepdim=True)
    picked = p_TV.gather(1, whole[0, len(prompt) :, None])[:, 0].log()
    return np.asarray(picked.numpy(), dtype=np.float32)
