"""Files of weights cut into buckets, against tensors placed by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from actors.engines.sglang.buckets import cut
from protocols.weights import Tensor, write_keyframe


def place(file: Path, tensors: dict[str, tuple[str, list[int], list[int]]]) -> int:
    """Write a header only; returns where the tensors would begin."""
    header = json.dumps({n: {"dtype": d, "shape": s, "data_offsets": o} for n, (d, s, o) in tensors.items()}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    return 8 + len(header)


def test_neighbours_share_a_bucket_until_it_is_full(tmp_path: Path) -> None:
    body = place(
        tmp_path / "f",
        {
            "c": ("F32", [4], [16, 32]),
            "a": ("F32", [2], [0, 8]),
            "b": ("F32", [2, 1], [8, 16]),
            "d": ("F32", [1], [32, 36]),
        },
    )
    first, second = cut(tmp_path / "f", ["a", "b", "c", "d"], limit=20)
    assert (first.start, first.size, first.names) == (body, 16, ("a", "b"))
    assert (second.start, second.size, second.names) == (body + 16, 20, ("c", "d"))
    assert first.shapes == ((2,), (2, 1)) and second.dtypes == ("float32", "float32")


def test_a_tensor_larger_than_a_bucket_has_its_own(tmp_path: Path) -> None:
    place(tmp_path / "f", {"a": ("F32", [1], [0, 4]), "b": ("F32", [9], [4, 40]), "c": ("F32", [1], [40, 44])})
    assert [bucket.names for bucket in cut(tmp_path / "f", ["a", "b", "c"], limit=8)] == [("a",), ("b",), ("c",)]


def test_gaps_tensors_left_out_and_unaligned_ones_begin_a_new_bucket(tmp_path: Path) -> None:
    place(
        tmp_path / "f",
        {
            "a": ("BF16", [1], [0, 2]),
            "b": ("F32", [1], [2, 6]),
            "left out": ("F32", [1], [6, 10]),
            "c": ("BF16", [2], [10, 14]),
        },
    )
    assert [bucket.names for bucket in cut(tmp_path / "f", ["a", "b", "c"])] == [("a",), ("b",), ("c",)]


def test_the_bytes_of_a_bucket_are_those_of_its_tensors(tmp_path: Path) -> None:
    tensors = {
        "one": Tensor("bfloat16", np.arange(6, dtype=np.uint16).reshape(2, 3)),
        "two": Tensor("float32", np.arange(4, dtype=np.float32)),
    }
    write_keyframe(tmp_path / "f", tensors, version=1)
    (bucket,) = cut(tmp_path / "f", tensors)
    content = (tmp_path / "f").read_bytes()[bucket.start : bucket.start + bucket.size]
    assert bucket.names == ("two", "one") and bucket.dtypes == ("float32", "bfloat16")
    assert content == tensors["two"].data.tobytes() + tensors["one"].data.tobytes()


def test_a_tensor_the_file_lacks_is_an_error(tmp_path: Path) -> None:
    place(tmp_path / "f", {"a": ("F32", [1], [0, 4])})
    with pytest.raises(KeyError, match="b"):
        cut(tmp_path / "f", ["a", "b"])
