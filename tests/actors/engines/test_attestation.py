"""What the ranks of a server must hold, worked out by hand, and the checksums of both kinds of servers."""

from __future__ import annotations

import hashlib
import subprocess

import numpy as np
import pytest

from actors.engines.sglang.attestation import Layout, expected_checksums
from actors.engines.sglang.checksums import cuda_checksum
from protocols.weights import Tensor
from tests.actors.engines.servers import PYTHON

SIZES = (1, 2, 5, 32_768, 65_541, 160_003)
"""Bytes: less than a word, words with a rest, a tile, tiles with a rest."""

KERNEL = """
import torch
import sglang.kernels.ops.memory.gpu_tensor_hash as own

class OnGpu(torch.Tensor):
    is_cuda = True

for size in (%s):
    content = torch.arange(size) * 7 %% 251
    print(f"{own.gpu_tensor_hash(content.to(torch.uint8).as_subclass(OnGpu)):016x}")
"""


def content(size: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return (np.arange(size) * 7 % 251).astype(np.uint8)


@pytest.mark.sglang
def test_checksums_of_cuda_servers_are_those_of_their_own_kernel() -> None:
    """Triton's interpreter runs the kernel on the CPU."""
    script = KERNEL % ", ".join(map(str, SIZES))
    told = subprocess.run(
        [str(PYTHON), "-c", script], env={"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=True
    )
    assert [cuda_checksum([content(size)]) for size in SIZES] == told.stdout.split()


def test_a_tensor_in_parts_has_the_checksum_of_the_whole() -> None:
    whole = content(100_000)
    for cut in (4, 40_000, 99_999):
        assert cuda_checksum([whole[:cut], whole[cut:]]) == cuda_checksum([whole])
    assert cuda_checksum([whole[:-1]]) != cuda_checksum([whole])


def floats(*rows: list[float]) -> Tensor:
    return Tensor("float32", np.array(rows, dtype=np.float32))


def sha(*values: float) -> str:
    return hashlib.sha256(np.array(values, dtype=np.float32).tobytes()).hexdigest()[:16]


def test_two_ranks_hold_halves_of_what_is_cut_and_all_of_the_rest() -> None:
    weights = {
        "m.layers.0.q_proj.weight": floats([1], [2], [3], [4]),
        "m.layers.0.k_proj.weight": floats([5], [6]),
        "m.layers.0.v_proj.weight": floats([7], [8]),
        "m.layers.0.o_proj.weight": floats([1, 2, 3, 4]),
        "m.layers.0.norm.weight": floats([9]),
        "m.layers.0.experts.1.gate_proj.weight": floats([30], [31]),
        "m.layers.0.experts.1.up_proj.weight": floats([32], [33]),
        "m.layers.0.experts.0.gate_proj.weight": floats([20], [21]),
        "m.layers.0.experts.0.up_proj.weight": floats([22], [23]),
        "model.embed_tokens.weight": floats(*[[float(row)] for row in range(1, 41)]),
    }
    first, second = expected_checksums(weights, Layout("float32", "cuda", tied=True, ranks=2, key_heads=2))
    cpu = expected_checksums(weights, Layout("float32", "cpu", tied=True, ranks=2, key_heads=2))
    assert [sorted(rank) for rank in cpu] == [
        ["lm_head.weight", "m.layers.0.norm.weight", "model.embed_tokens.weight"]
    ] * 2
    by_hand = {
        "m.layers.0.qkv_proj.weight": ([1, 2, 5, 7], [3, 4, 6, 8]),
        "m.layers.0.o_proj.weight": ([1, 2], [3, 4]),
        "m.layers.0.norm.weight": ([9], [9]),
        "m.layers.0.experts.w13_weight": ([20, 22, 30, 32], [21, 23, 31, 33]),
        "model.embed_tokens.weight": (range(1, 33), [*range(33, 41), *[0] * 24]),
    }
    assert sorted(first) == sorted(second) == sorted([*by_hand, "lm_head.weight"])
    for name, halves in by_hand.items():
        expected = [cuda_checksum([np.array(half, dtype=np.float32).view(np.uint8)]) for half in halves]
        assert [first[name], second[name]] == expected, name
    assert [rank["m.layers.0.norm.weight"] for rank in cpu] == [sha(9)] * 2


def test_key_heads_that_the_ranks_cannot_share_are_not_guessed_at() -> None:
    weights = {f"m.{name}_proj.weight": floats([1], [2]) for name in "qkv"}
    (alone,) = expected_checksums(weights, Layout("float32", "cuda", tied=False, key_heads=1))
    assert list(alone) == ["m.qkv_proj.weight"]
    assert expected_checksums(weights, Layout("float32", "cuda", tied=False, ranks=2, key_heads=1)) == ({}, {})
