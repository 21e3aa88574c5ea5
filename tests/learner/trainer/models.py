"""Tiny models, random sequences and a plain one-by-one reference for the trainer's tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from learner.trainer.plan import Sample
from matpo.config import M2po, Objective
from matpo.objective.chosen import token_loss
from matpo.objective.tokens import Tokens

VOCABULARY = 13
Family = Literal["llama", "qwen3"]


GPU_HEAD_WIDTH = 16
"""Least that FlexAttention's compiled kernel takes."""


def tiny_model(family: Family, *, tied: bool = True, seed: int = 0, head_width: int = 8) -> PreTrainedModel:
    """Two layers, width 16, grouped key heads, weights large enough for attention to matter."""
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_width,
        "intermediate_size": 24,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "initializer_range": 0.3,
    }
    model = (
        LlamaForCausalLM(LlamaConfig.from_dict(shape))
        if family == "llama"
        else Qwen3ForCausalLM(Qwen3Config.from_dict(shape))
    )
    model.set_attn_implementation("eager")
    return model


def sample(tokens: Sequence[int], sampled: Sequence[int], *, seed: int = 0, role: str = "planner") -> Sample:
    """A sample whose tokens at the places `sampled` were chosen, with made-up behaviour, advantage and weight."""
    rng = np.random.default_rng([seed, len(tokens), *tokens])
    flags = np.zeros(len(tokens), np.bool_)
    flags[list(sampled)] = True
    return Sample(
        role=role,
        tokens=np.array(tokens, np.int32),
        sampled=flags,
        behaviour=rng.uniform(-4, -0.5, len(sampled)).astype(np.float32),
        advantage=float(rng.normal()),
        weight=float(rng.uniform(0.01, 0.1)),
        temperature=1.0,
    )


def eager_logp(model: PreTrainedModel | PeftModel, one: Sample) -> Tensor:
    """log π of each sampled token by the model's own forward pass."""
    tokens = torch.from_numpy(one.tokens).long()
    logits: Tensor = model(tokens[None]).logits[0, :-1].float() / one.temperature
    chosen = torch.from_numpy(one.sampled)[1:]
    return logits.log_softmax(-1)[chosen].gather(1, tokens[1:][chosen][:, None]).squeeze(1)


def outliers_aside(
    model: PreTrainedModel | PeftModel, samples: Sequence[Sample], threshold: float
) -> dict[int, Tensor]:
    """Per sample, the tokens that stay when the largest (log ρ)² of all go one by one until their mean is small."""
    with torch.no_grad():
        squares = [(eager_logp(model, one) - torch.from_numpy(one.behaviour)).square().tolist() for one in samples]
    left = sorted(value for one in squares for value in one)
    while left and sum(left) / len(left) > threshold:
        left.pop()
    limit = left[-1] if left else -1.0
    return {number: torch.tensor([value <= limit for value in one]) for number, one in enumerate(squares)}


def reference_gradient(
    model: PreTrainedModel | PeftModel, samples: Sequence[Sample], objective: Objective
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the same weighted sum with the model's own eager forward pass, one sequence at a time."""
    for parameter in model.parameters():
        parameter.grad = None
    whole = 0.0
    kept = outliers_aside(model, samples, objective.threshold) if isinstance(objective, M2po) else {}
    for number, one in enumerate(samples):
        logp_T = eager_logp(model, one)
        terms = token_loss(
            objective,
            Tokens(
                logp_T,
                behaviour_T=torch.from_numpy(one.behaviour),
                advantage_T=torch.full_like(logp_T, one.advantage),
                drift_T=(logp_T.detach() - torch.from_numpy(one.behaviour)).mean().expand_as(logp_T),
                kept_T=kept.get(number),
            ),
        )
        loss = one.weight * terms.loss_T.sum()
        torch.autograd.backward(loss)
        whole += loss.item()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return whole, grads
