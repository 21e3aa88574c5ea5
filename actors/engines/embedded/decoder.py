"""The forward pass of Llama, Qwen2 and Qwen3 on slotted keys and values: extend prompts, decode all running rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from actors.engines.embedded.architecture import Architecture
from actors.engines.embedded.cache import Slots
from actors.engines.embedded.parameters import Layer, Parameters

ATTENDED_STEP = 16
"""Attention looks at a multiple of so many positions, so that kernels see few different shapes."""
MOST_PADDING = 4
"""Pieces are attended together while padding makes their area at most so many times larger."""
NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens to append to a slot that already holds `start` positions."""

    slot: int
    start: int
    tokens: NDArray[np.int32]


def groups(pieces: Sequence[Piece]) -> Iterator[Sequence[Piece]]:
    """Runs of pieces worth padding to one length; a long prompt among short ones stands alone."""
    begin, longest, total = 0, 0, 0
    for index, piece in enumerate(pieces):
        length = len(piece.tokens)
        if total and max(longest, length) * (index - begin + 1) > MOST_PADDING * (total + length):
            yield pieces[begin:index]
            begin, longest, total = index, 0, 0
        longest, total = max(longest, length), total + length
    if total:
        yield pieces[begin:]


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
        self._positions = torch.arange(max(slots.context, len(slots.values)), device=self._device)
        self._queries = architecture.num_attention_heads
        self._rotated = architecture.num_attention_heads + architecture.num_key_value_heads
        self._heads = self._rotated + architecture.num_key_value_heads

    def decode(self, parameters: Parameters, tokens: NDArray[np.int32], positions: NDArray[np.int64]) -> torch.Tensor:
        """Logits [B, vocabulary] (float32) after token `tokens[b]` at `positions[b]` of slot b, for slots 0 … B-1."""
        rows, keys, size = len(tokens), self._slots.heads, self._architecture.head_size
        attended = self._attended(int(positions.max()) + 1)
        position = torch.from_numpy(positions).to(self._device)
        cos, sin = self._cos[position][:, None], self._sin[position][:, None]
        lines = self._slots.lines(self._positions[:rows], position)
        mask = self._mask(position[:, None], attended)
        hidden = F.embedding(torch.from_numpy(tokens).to(self._device), parameters.embedding)
        for index, layer in enumerate(parameters.layers):
            query, key, value = self._project(layer, hidden, cos, sin)
            self._slots.write(lines[index], key, value)
            held = self._slots.values[:rows, index, :, :, :attended]
            # Query heads that share a key head are its rows: no key is repeated.
            mixed = F.scaled_dot_product_attention(
                query.view(rows, keys, -1, size), held[:, 0], held[:, 1], attn_mask=mask
            )
            hidden = self._finish(layer, hidden, mixed.reshape(rows, -1))
        return F.linear(self._norm(hidden, parameters.norm), parameters.head).float()

    def extend(self, parameters: Parameters, pieces: Sequence[Piece]) -> None:
        """Compute the keys and values of the pieces' tokens; their slots are consecutive.

        Only attention sees padding: everything else runs on the tokens of all pieces, one after the other.
        """
        for group in groups(pieces):
            self._extend(parameters, group)

    def _extend(self, parameters: Parameters, pieces: Sequence[Piece]) -> None:
        lengths = np.array([len(p.tokens) for p in pieces])
        starts = np.array([p.start for p in pieces])
        rows, longest = len(pieces), int(lengths.max())
        first = pieces[0].slot
        row_N = np.repeat(np.arange(rows), lengths)
        within_N = np.arange(len(row_N)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        position = torch.from_numpy(starts[row_N] + within_N).to(self._device)
        padded = torch.from_numpy(row_N * longest + within_N).to(self._device)
        cos, sin = self._cos[position][:, None], self._sin[position][:, None]
        lines = self._slots.lines(torch.from_numpy(row_N + first).to(self._device), position)
        attended = self._attended(int((starts + lengths).max()))
        asking = torch.from_numpy(starts[:, None] + np.arange(longest)).to(self._device)
        mask = self._mask(asking, attended).repeat(1, 1, self._architecture.heads_per_key, 1)
        tokens = torch.from_numpy(np.concatenate([p.tokens for p in pieces])).to(self._device)
        hidden = F.embedding(tokens, parameters.embedding)
        last = len(parameters.layers) - 1
        for index, layer in enumerate(parameters.layers):
            query, key, value = self._project(layer, hidden, cos, sin)
            self._slots.write(lines[index], key, value)
            if index != last:  # the last layer's output is nobody's: the prompt's last token is decoded
                held = self._slots.values[first : first + rows, index, :, :, :attended]
                mixed = self._attend(query, padded, held, mask, longest)
                hidden = self._finish(layer, hidden, mixed)

    def _attend(
        self, query: torch.Tensor, padded: torch.Tensor, held: torch.Tensor, mask: torch.Tensor, longest: int
    ) -> torch.Tensor:
        """Attention of pieces: query [N, H, D], its row in the padded array [N], held [P, key or value, K, L, D] →
        [N, H·D]. Query heads that share a key head are its rows."""
        rows, keys, group = len(held), self._slots.heads, self._architecture.heads_per_key
        size = query.shape[-1]
        spread = query.new_zeros((rows * longest, keys, group, size))
        spread.index_copy_(0, padded, query.view(-1, keys, group, size))
        spread = spread.view(rows, longest, keys, group, size).permute(0, 2, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(
            spread.reshape(rows, keys, group * longest, size), held[:, 0], held[:, 1], attn_mask=mask
        )
        mixed = mixed.view(rows, keys, group, longest, size).permute(0, 3, 1, 2, 4)
        return mixed.reshape(rows * longest, -1)[padded]

    def _attended(self, longest: int) -> int:
        return min(-(-longest // ATTENDED_STEP) * ATTENDED_STEP, self._slots.context)

    def _mask(self, asking: torch.Tensor, attended: int) -> torch.Tensor:
        """0 where the token at position `asking[b, n]` may look, -inf elsewhere: [B, 1, N, attended]."""
        hidden = self._positions[:attended] > asking[:, None, :, None]
        return torch.zeros(hidden.shape, dtype=self._cos.dtype, device=self._device).masked_fill_(hidden, NEVER)

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
        scaled = F.rms_norm(values.float(), values.shape[-1:], eps=self._architecture.rms_norm_eps)
        return weight * scaled.to(values.dtype)
