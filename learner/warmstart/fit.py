"""The quick start's model and the supervised step of its warm start: next-token loss on marked tokens only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

ROPE_BASE = 10_000.0


@dataclass(frozen=True, slots=True)
class Example:
    """One token sequence; ``learn[i]`` says that token i is to be predicted from those before it."""

    tokens: tuple[int, ...]
    learn: tuple[bool, ...]


@dataclass(slots=True)
class Writer:
    """Builds an `Example` from pieces of text, each either given or to be learnt."""

    tokenizer: PreTrainedTokenizerFast
    tokens: list[int] = field(default_factory=list)
    learn: list[bool] = field(default_factory=list)

    def add(self, text: str, *, learn: bool = False) -> None:
        """Appends ``text``; a closed vocabulary makes its encoding the same whatever stands before it."""
        ids = encode(self.tokenizer, text)
        self.tokens += ids
        self.learn += [learn] * len(ids)

    def example(self) -> Example:
        """What was written so far."""
        return Example(tuple(self.tokens), tuple(self.learn))


_encoded: dict[str, list[int]] = {}


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of ``text``, remembered: the warm start writes the same few thousand strings millions of times."""
    if text not in _encoded:
        _encoded[text] = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return _encoded[text]


def make_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> Qwen3ForCausalLM:
    """A fresh Qwen3 of about 0.8 million parameters (3.2 MB in float32)."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def collate(examples: Sequence[Example], pad: int) -> tuple[Tensor, Tensor]:
    """Right-padded (tokens int64 [B, T], learn bool [B, T])."""
    length = max(len(example.tokens) for example in examples)
    tokens = torch.tensor([[*example.tokens, *[pad] * (length - len(example.tokens))] for example in examples])
    learn = torch.tensor([[*example.learn, *[False] * (length - len(example.learn))] for example in examples])
    return tokens, learn


@dataclass(frozen=True, slots=True)
class StepReport:
    """Mean loss (nats) and share of the learnt tokens that were the model's first choice."""

    loss: float
    accuracy: float
    gradient_norm: float


class Fitter:
    """AdamW with a linear warm-up; ``rate`` may be set between steps."""

    def __init__(self, model: Qwen3ForCausalLM, pad: int, *, rate: float, warmup_steps: int = 30) -> None:
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        vectors = [p for p in model.parameters() if p.ndim < 2]
        self.model, self.pad, self.rate, self.warmup_steps, self.steps = model, pad, rate, warmup_steps, 0
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
            lr=rate,
            betas=(0.9, 0.98),
        )

    def step(self, examples: Sequence[Example], *, parts: int = 1) -> StepReport:
        """One optimizer step on one batch, computed in ``parts`` of similar length so as not to compute padding."""
        ordered = sorted(examples, key=lambda example: len(example.tokens)) if parts > 1 else examples
        size = -(-len(ordered) // parts)
        count = sum(sum(example.learn[1:]) for example in ordered)
        self.optimizer.zero_grad(set_to_none=True)
        total = right = 0.0
        for start in range(0, len(ordered), size):
            tokens, learn = collate(ordered[start : start + size], self.pad)
            hidden = self.model.model(input_ids=tokens[:, :-1]).last_hidden_state  # padded right: causal is enough
            mask = learn[:, 1:]
            logits, targets = self.model.lm_head(hidden[mask]), tokens[:, 1:][mask]
            loss = nn.functional.cross_entropy(logits, targets, reduction="sum") / count
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
            right += int((logits.detach().argmax(-1) == targets).sum())
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * min(1.0, self.steps / self.warmup_steps)
        self.optimizer.step()
        return StepReport(total, right / count, norm.item())


def cosine(progress: float, *, floor: float = 0.05) -> float:
    """Share of the peak learning rate at ``progress`` in [0, 1]."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
