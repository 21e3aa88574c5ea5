"""Every way of attending over a trie gives what attention along each path gives, and the same gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from learner.trainer.attention import rectangles, windows
from learner.trainer.attention.flex import BLOCK, flex_tree_attention, plan_block_mask, visible
from learner.trainer.attention.geometry import runs
from learner.trainer.attention.packed import hidden_of_paths, plan_paths
from learner.trainer.attention.rectangles import plan_rectangles, rectangle_attention
from learner.trainer.attention.varlen import plan_varlen, varlen_tree_attention
from learner.trainer.attention.windows import plan_window, window_attention
from learner.trainer.trie import Trie, build_trie

CPU = torch.device("cpu")
SCALE = 0.7


def trie_of(sequences: Sequence[Sequence[int]]) -> Trie:
    return build_trie([np.array(sequence, np.int32) for sequence in sequences])


TRIES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=24), min_size=1, max_size=12).map(trie_of)
"""Over three tokens: duplicates, strict prefixes, single tokens and deep forks are all common."""

DEEP = trie_of([[0] * depth + [1] * 3 for depth in range(1, 40)])
"""A path with a fork after every token of it."""


def on_paths(trie: Trie, window: int | None = None) -> Tensor:
    """bool [N, N]: token k is on the path of token q, and among the last `window` of it. Built from the paths alone."""
    seen = torch.zeros(len(trie.tokens), len(trie.tokens), dtype=torch.bool)
    for path in trie.paths:
        for depth, token in enumerate(path):
            seen[token, path[0 if window is None else max(0, depth - window + 1) : depth + 1]] = True
    return seen


@dataclass(frozen=True)
class Inputs:
    """Queries with 2·3 heads, keys and values with 2, and the gradient to send back; width 8."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor

    @classmethod
    def random(cls, tokens: int, dtype: torch.dtype = torch.float32) -> Inputs:
        generator = torch.Generator().manual_seed(tokens)
        query, key, value = (
            torch.randn(1, heads, tokens, 8, generator=generator).to(dtype).requires_grad_() for heads in (6, 2, 2)
        )
        return cls(query, key, value, torch.randn(1, tokens, 6, 8, generator=generator).to(dtype))

    def run(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Tensor]:
        """Output and the three gradients."""
        output = attend(self.query, self.key, self.value)
        return [output.detach(), *torch.autograd.grad(output, (self.query, self.key, self.value), self.grad)]

    def expected(self, seen: Tensor) -> list[Tensor]:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            scores = query @ key.repeat_interleave(3, 1).transpose(-1, -2) * SCALE
            return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value.repeat_interleave(3, 1)).transpose(1, 2)

        return self.run(attend)


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).abs().max()) <= tolerance * max(1.0, float(other.abs().max()))


@given(trie=TRIES)
@example(trie=DEEP)
def test_a_token_sees_its_path_and_nothing_else(trie: Trie) -> None:
    place, end = torch.arange(len(trie.tokens)), torch.from_numpy(trie.subtree_end)
    assert torch.equal((place[None] <= place[:, None]) & (place[:, None] < end[None]), on_paths(trie))


@given(trie=TRIES)
def test_runs_rectangles_and_causal_parts_hold_every_visible_pair_once(trie: Trie) -> None:
    pairs = torch.zeros(len(trie.tokens), len(trie.tokens), dtype=torch.int64)
    for run in runs(trie):
        pairs[run, run] += torch.ones_like(pairs[run, run]).tril()
    for rectangle in plan_rectangles(trie).rectangles:
        pairs[rectangle.queries, rectangle.keys] += 1
    assert torch.equal(pairs, on_paths(trie).long())


@pytest.mark.parametrize("short_run", [1, 4, 1000])
@settings(max_examples=40, deadline=None)
@given(trie=TRIES)
@example(trie=DEEP)
def test_rectangles_are_exact_whatever_is_computed_side_by_side(short_run: int, trie: Trie) -> None:
    inputs = Inputs.random(len(trie.tokens))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rectangles, "SHORT_RUN", short_run)
        plan = plan_rectangles(trie)
    found = inputs.run(lambda q, k, v: rectangle_attention(q, k, v, plan, SCALE))
    assert_close(found, inputs.expected(on_paths(trie)))


@settings(max_examples=60, deadline=None)
@given(trie=TRIES, window=st.integers(1, 9), longest=st.sampled_from([1, 5, 128]))
@example(trie=DEEP, window=3, longest=128)
def test_windows_are_exact_however_chains_are_cut(trie: Trie, window: int, longest: int) -> None:
    inputs = Inputs.random(len(trie.tokens))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "LONGEST_CHAIN", longest)
        plan = plan_window(trie, window)
    found = inputs.run(lambda q, k, v: window_attention(q, k, v, plan, SCALE))
    assert_close(found, inputs.expected(on_paths(trie, window)))


def test_bfloat16_rectangles_and_windows_are_exact_to_bfloat16() -> None:
    trie = trie_of([[1] * 30 + [number] * 9 for number in range(20)])
    wide, narrow = Inputs.random(len(trie.tokens)), Inputs.random(len(trie.tokens), torch.bfloat16)
    found = narrow.run(lambda q, k, v: rectangle_attention(q, k, v, plan_rectangles(trie), SCALE))
    assert_close([x.float() for x in found], wide.expected(on_paths(trie)), 0.03)
    found = narrow.run(lambda q, k, v: window_attention(q, k, v, plan_window(trie, 7), SCALE))
    assert_close([x.float() for x in found], wide.expected(on_paths(trie, 7)), 0.03)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=30, deadline=None)
@given(trie=TRIES, window=st.one_of(st.none(), st.integers(1, 9)))
@example(trie=DEEP, window=3)
def test_flex_is_exact(trie: Trie, window: int | None) -> None:
    """Forward only: away from a GPU PyTorch has no backward pass for it."""
    inputs = Inputs.random(len(trie.tokens))
    query, key, value = (tensor.detach() for tensor in (inputs.query, inputs.key, inputs.value))
    found = flex_tree_attention(query, key, value, plan_block_mask(trie, window, CPU), SCALE)
    assert_close([found], inputs.expected(on_paths(trie, window))[:1])


@pytest.mark.parametrize("window", [None, 40, 300])
def test_the_block_mask_computes_the_blocks_with_a_visible_pair_and_masks_those_that_are_not_full(
    window: int | None,
) -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 9, 600)
    trie = build_trie(
        [
            np.concatenate([base[:shared], rng.integers(0, 9, own)]).astype(np.int32)
            for shared, own in rng.integers(1, [600, 200], (9, 2))
        ]
    )  # fmt: skip
    end, depth = torch.from_numpy(trie.subtree_end), torch.from_numpy(trie.positions)
    tokens = len(trie.tokens)
    reference = create_block_mask(visible(end, depth, window), None, None, tokens, tokens, CPU, BLOCK)
    found = plan_block_mask(trie, window, CPU)
    assert found.shape == reference.shape
    dense, needed = found.to_dense()[0, 0], reference.to_dense()[0, 0]
    assert bool((dense >= needed).all())
    assert window is not None or torch.equal(dense, needed)
    assert int(dense.sum()) < dense.numel() / 2


def reference_kernel(
    query: Tensor, key: Tensor, value: Tensor, query_ends: Tensor, key_ends: Tensor, most_queries: int, most_keys: int,
    *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """What `torch.nn.attention.varlen.varlen_attn` documents, with its call signature."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert query_ends.dtype == key_ends.dtype == torch.int32
    output = []
    for number in range(len(query_ends) - 1):
        q = query[query_ends[number] : query_ends[number + 1]].transpose(0, 1)
        k, v = (
            rows[key_ends[number] : key_ends[number + 1]].transpose(0, 1).repeat_interleave(len(q) // rows.shape[1], 0)
            for rows in (key, value)
        )
        assert q.shape[1] <= most_queries
        assert k.shape[1] <= most_keys
        # The last query stands on the last key.
        behind = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])[None]
        left, right = window_size
        hidden = (behind < -right) | ((behind > left) if left >= 0 else torch.zeros_like(behind).bool())
        output.append(((q @ k.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(output)


@settings(max_examples=40, deadline=None)
@given(trie=TRIES, window=st.one_of(st.none(), st.integers(1, 9)))
@example(trie=DEEP, window=3)
def test_varlen_is_exact_with_a_kernel_that_does_what_is_documented(trie: Trie, window: int | None) -> None:
    inputs = Inputs.random(len(trie.tokens))
    plan = plan_varlen(trie, window, CPU)
    found = inputs.run(lambda q, k, v: varlen_tree_attention(q, k, v, plan, SCALE, reference_kernel))
    assert_close(found, inputs.expected(on_paths(trie, window)))


@given(trie=TRIES)
def test_packed_paths_give_each_token_the_state_its_path_gives_it(trie: Trie) -> None:
    """The model here: a running sum of the path, which depends on everything before a token and on nothing after."""
    tokens = torch.from_numpy(trie.tokens)
    found = hidden_of_paths(lambda rows: rows.cumsum(1)[..., None].double(), tokens, plan_paths(trie, CPU))
    expected = on_paths(trie).double() @ tokens.double()
    assert torch.equal(found[:, 0], expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("way", ["flex", "varlen"])
def test_gpu_kernels_agree_with_rectangles_in_bfloat16(way: str, window: int | None) -> None:
    device = torch.device("cuda")
    trie = trie_of([[1] * 300 + [number] * 90 for number in range(20)])
    inputs = Inputs.random(len(trie.tokens), torch.bfloat16)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (torch.nn.functional.pad(x, (0, 56)).to(device) for x in (query, key, value))  # 64 wide
        if way == "flex":
            output = flex_tree_attention(q, k, v, plan_block_mask(trie, window, device), SCALE)
        else:
            output = varlen_tree_attention(q, k, v, plan_varlen(trie, window, device), SCALE)
        return output[..., :8].to("cpu")

    expected = Inputs.random(len(trie.tokens)).expected(on_paths(trie, window))
    assert_close([x.float() for x in inputs.run(attend)], expected, 0.03)
