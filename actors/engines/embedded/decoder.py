"""The forward pass of Llama, Qwen2 and Qwen3 on slotted keys and values: extend prompts, decode all running rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from actors.engines.embedded.architecture import Architecture
from actors.engines.embedded.cache import Slots
from actors.engines.embedded.parameters import Layer, Parameters

ATTENDED_STEP = 16
"""Decoding looks at a multiple of so many positions, so that kernels see few different shapes."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens to append to a slot that already holds `start` positions."""

    slot: int
    start: int
    tokens: NDArray[np.int32]


class Decoder:
    """Runs one set of parameters at a time. Shapes: B rows, N tokens, H query heads, K key heads, D head size."""

    def __init__(self, architecture: Architecture, slots: Slots) -> None:
        self._architecture = architecture
        self._slots = slots
        self._device = slots.values.device
        size = architecture.head_size
        frequencies = 1.0 / (architecture.rotary_base ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size))
        angles = torch.outer(torch.arange(slots.context).float(), frequencies)
        dtype = slots.values.dtype
        self._cos = torch.cat([angles.cos(), angles.cos()], dim=-1).to(self._device, dtype)
        # The sign of "rotate half" lives in the table: x·cos + roll(x, D/2)·sin.
        self._sin = torch.cat([-angles.sin(), angles.sin()], dim=-1).to(self._device, dtype)
        self._positions = torch.arange(slots.context, device=self._device)
        self._queries = architecture.num_attention_heads
        self._rotated = architecture.num_attention_heads + architecture.num_key_value_heads
        self._heads = self._rotated + architecture.num_key_value_heads

    def decode(self, parameters: Parameters, tokens: NDArray[np.int32], positions: NDArray[np.int64]) -> torch.Tensor:
        """Logits [B, vocabulary] (float32) after token `tokens[b]` at `positions[b]` of slot b, for slots 0 … B-1."""
        rows, keys, size = len(tokens), self._architecture.num_key_value_heads, self._architecture.head_size
        longest = int(positions.max()) + 1
        attended = min(-(-longest // ATTENDED_STEP) * ATTENDED_STEP, self._slots.context)
        position = torch.from_numpy(positions).to(self._device)
        cos, sin = self._cos[position][:, None], self._sin[position][:, None]
        heads = (np.arange(rows * keys) * self._slots.context).reshape(rows, keys) + positions[:, None]
        where = torch.from_numpy(heads.reshape(-1)).to(self._device)
        visible = self._positions[:attended] <= position[:, None]
        mask = torch.zeros(visible.shape, dtype=cos.dtype, device=self._device).masked_fill_(~visible, float("-inf"))
        mask = mask[:, None, None]
        hidden = F.embedding(torch.from_numpy(tokens).to(self._device), parameters.embedding)
        for index, layer in enumerate(parameters.layers):
            query, key, value = self._project(layer, hidden, cos, sin)
            held = self._slots.values[index]
            held[0].view(-1, size).index_copy_(0, where, key.reshape(-1, size))
            held[1].view(-1, size).index_copy_(0, where, value.reshape(-1, size))
            # Query heads that share a key head are its rows: no key is repeated.
            mixed = F.scaled_dot_product_attention(
                query.view(rows, keys, -1, size),
                held[0, :rows, :, :attended],
                held[1, :rows, :, :attended],
                attn_mask=mask,
            )
            hidden = self._finish(layer, hidden, mixed.reshape(rows, -1))
        return F.linear(self._norm(hidden, parameters.norm), parameters.head).float()

    def extend(self, parameters: Parameters, pieces: list[Piece]) -> None:
        """Compute the keys and values of each piece's tokens. Pieces are concatenated: no padding."""
        positions = np.concatenate([np.arange(p.start, p.start + len(p.tokens)) for p in pieces])
        position = torch.from_numpy(positions).to(self._device)
        cos, sin = self._cos[position][:, None], self._sin[position][:, None]
        tokens = torch.from_numpy(np.concatenate([p.tokens for p in pieces])).to(self._device)
        masks = [self._mask(p) for p in pieces]
        last = len(parameters.layers) - 1
        hidden = F.embedding(tokens, parameters.embedding)
        for index, layer in enumerate(parameters.layers):
            query, key, value = self._project(layer, hidden, cos, sin)
            held = self._slots.values[index]
            mixed = torch.empty_like(query)
            at = 0
            for piece, mask in zip(pieces, masks, strict=True):
                span, stop = slice(at, at + len(piece.tokens)), piece.start + len(piece.tokens)
                held[0, piece.slot, :, piece.start : stop] = key[span].transpose(0, 1)
                held[1, piece.slot, :, piece.start : stop] = value[span].transpose(0, 1)
                at += len(piece.tokens)
                if index != last:
                    mixed[span] = self._attend(query[span], held[:, piece.slot, :, :stop], mask)
            if index != last:  # the last layer's output is nobody's: the prompt's last token is decoded
                hidden = self._finish(layer, hidden, mixed.view(len(positions), -1))

    def _mask(self, piece: Piece) -> torch.Tensor | None:
        """Which positions each token of a piece may see; None for plain causal."""
        if piece.start == 0:
            return None
        stop = piece.start + len(piece.tokens)
        return self._positions[:stop] <= self._positions[piece.start : stop, None]

    def _attend(self, query: torch.Tensor, held: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Attention of one piece: query [N, H, D] over held [key or value, K, positions, D] → [N, H, D]."""
        mixed = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None], held[0][None], held[1][None],
            attn_mask=mask, is_causal=mask is None, enable_gqa=True,
        )  # fmt: skip
        return mixed[0].transpose(0, 1)

    def _project(
        self, layer: Layer, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries [N, H, D] and keys [N, K, D], and values [N, K, D]."""
        size = self._architecture.head_size
        fused = F.linear(self._norm(hidden, layer.attention_norm), layer.qkv, layer.qkv_bias)
        fused = fused.view(len(hidden), self._heads, size)
        turned, value = fused[:, : self._rotated], fused[:, self._rotated :]
        if layer.head_norm is not None:
            turned = self._norm(turned, layer.head_norm)
        turned = torch.addcmul(turned * cos, torch.roll(turned, size // 2, -1), sin)
        return turned[:, : self._queries], turned[:, self._queries :], value

    def _finish(self, layer: Layer, hidden: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """Output projection and feed-forward, each added to the residual stream."""
        hidden = torch.addmm(hidden, mixed, layer.output.t())
        if layer.output_bias is not None:
            hidden = hidden + layer.output_bias
        gate, up = F.linear(self._norm(hidden, layer.mlp_norm), layer.gate_up).chunk(2, dim=-1)
        return torch.addmm(hidden, F.silu(gate) * up, layer.down.t())

    def _norm(self, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Root-mean-square norm in float32, as the Hugging Face modules compute it."""
        wide = values.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._architecture.rms_norm_eps)
        return weight * (wide * scale).to(values.dtype)
