"""Many conversations of the quick-start model at once, each with its own key-value cache that grows turn by turn.

A simulator for measuring the warm start without actors and tool servers: rows advance in lockstep, every row extends
its own conversation by a chunk of given tokens and then samples until the end token or a limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM

from learner.warmstart.fit import ROPE_BASE


@dataclass(frozen=True, slots=True)
class Request:
    """Extend conversation ``row`` by ``chunk`` (token ids) and sample; ``fresh`` forgets what the row held before."""

    row: int
    chunk: tuple[int, ...]
    fresh: bool = False


@dataclass(frozen=True, slots=True)
class Completion:
    """Sampled tokens, the end token included when it came, with their log-probabilities at the sampling temperature."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Sampler:
    """``rows`` conversations of up to ``length`` tokens; weights are read from ``model`` at every call."""

    def __init__(self, model: Qwen3ForCausalLM, *, rows: int, length: int, max_new: int, end: int, seed: int) -> None:
        config = model.config
        self.model, self.length, self.max_new, self.end = model, length, max_new, end
        self.heads, self.width = config.num_attention_heads, config.head_dim
        self.kv_heads = config.num_key_value_heads or self.heads
        shape = (config.num_hidden_layers, rows, self.kv_heads, length, self.width)
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape)
        self.filled = [0] * rows
        self.pending: list[tuple[int, ...]] = [()] * rows
        self.generator = torch.Generator().manual_seed(seed)
        frequencies = ROPE_BASE ** (-torch.arange(0, self.width, 2) / self.width)
        angles = torch.arange(length)[:, None] * torch.cat((frequencies, frequencies))[None]
        self.cos, self.sin = angles.cos(), angles.sin()

    @torch.inference_mode()
    def sample(self, requests: Sequence[Request], temperature: float) -> list[Completion]:
        """One completion per request, in order; temperature 0 takes the most probable token."""
        rows = torch.tensor([request.row for request in requests])
        chunks: list[tuple[int, ...]] = []
        for request in requests:
            if request.fresh:
                self.filled[request.row], self.pending[request.row] = 0, ()
            chunks.append(self.pending[request.row] + request.chunk)
        keys, values = self.keys[:, rows], self.values[:, rows]
        widest = max(len(chunk) for chunk in chunks)
        tokens = torch.tensor([[*chunk, *[0] * (widest - len(chunk))] for chunk in chunks])
        starts = torch.tensor([self.filled[request.row] for request in requests])
        sizes = torch.tensor([len(chunk) for chunk in chunks])
        hidden = self._forward(tokens, starts, keys, values)
        hidden, starts = hidden[torch.arange(len(chunks)), sizes - 1], starts + sizes
        limits = [min(self.max_new, self.length - int(start)) for start in starts]
        picked, scores = self._decode(hidden, starts, keys, values, temperature)
        self.keys[:, rows], self.values[:, rows] = keys, values
        return [
            self._settle(request, int(starts[i]), picked[i][: limits[i]], scores[i][: limits[i]])
            for i, request in enumerate(requests)
        ]

    def _settle(self, request: Request, start: int, picked: list[int], scores: list[float]) -> Completion:
        count = picked.index(self.end) + 1 if self.end in picked else len(picked)
        self.filled[request.row] = start + max(count - 1, 0)
        self.pending[request.row] = tuple(picked[max(count - 1, 0) : count])  # sampled last, not yet in the cache
        return Completion(tuple(picked[:count]), tuple(scores[:count]))

    def _decode(
        self, hidden: Tensor, starts: Tensor, keys: Tensor, values: Tensor, temperature: float
    ) -> tuple[list[list[int]], list[list[float]]]:
        picked, scores = [], []
        ended = torch.zeros(len(starts), dtype=torch.bool)
        for offset in range(self.max_new):
            logprobs = (self.model.lm_head(hidden) / (temperature or 1.0)).log_softmax(-1)
            if temperature == 0:
                token = logprobs.argmax(-1)
            else:
                token = torch.multinomial(logprobs.exp(), 1, generator=self.generator)[:, 0]
            picked.append(token)
            scores.append(logprobs.gather(-1, token[:, None])[:, 0])
            ended |= (token == self.end) | (starts + offset + 1 >= self.length)
            if bool(ended.all()) or offset + 1 == self.max_new:
                break
            position = (starts + offset).clamp(max=self.length - 1)
            hidden = self._forward(token[:, None], position, keys, values)[:, 0]
        return torch.stack(picked, 1).tolist(), torch.stack(scores, 1).tolist()

    def _forward(self, tokens: Tensor, starts: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Hidden states [B, L, H] of ``tokens`` [B, L] placed from ``starts`` [B]; writes the caches in place."""
        body = self.model.model
        batch, width = tokens.shape
        positions = (starts[:, None] + torch.arange(width)).clamp(max=self.length - 1)
        horizon = int(positions.max()) + 1
        cos, sin = self.cos[positions][:, :, None], self.sin[positions][:, :, None]
        visible = torch.arange(horizon)[None, None] <= positions[:, :, None]
        lines = torch.arange(batch)[:, None].expand(-1, width)
        hidden = body.embed_tokens(tokens)
        for index, layer in enumerate(body.layers):
            attention = layer.self_attn
            x = layer.input_layernorm(hidden)
            query = attention.q_norm(attention.q_proj(x).view(batch, width, self.heads, self.width))
            key = attention.k_norm(attention.k_proj(x).view(batch, width, self.kv_heads, self.width))
            keys[index][lines, :, positions] = _rotate(key, cos, sin)
            values[index][lines, :, positions] = attention.v_proj(x).view(batch, width, self.kv_heads, self.width)
            mixed = nn.functional.scaled_dot_product_attention(
                _rotate(query, cos, sin).transpose(1, 2),
                keys[index][:, :, :horizon],
                values[index][:, :, :horizon],
                attn_mask=visible[:, None],
                enable_gqa=True,
            )
            hidden = hidden + attention.o_proj(mixed.transpose(1, 2).reshape(batch, width, -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        normed: Tensor = body.norm(hidden)
        return normed
