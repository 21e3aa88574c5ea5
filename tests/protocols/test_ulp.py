"""The delta's inner loops: never outside their arrays, whatever the streams say."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from protocols import ulp

GUARD = 70
"""Elements before and after the array that must stay as they are."""


Scalar = TypeVar("Scalar", np.uint8, np.uint16, np.uint32)


def read_only(values: NDArray[Scalar]) -> NDArray[Scalar]:
    """The loops are compiled for inputs that cannot be written."""
    values.flags.writeable = False
    return values


def stream(kind: type[Scalar]) -> st.SearchStrategy[NDArray[Scalar]]:
    small = st.sampled_from([0, 1, 254, 255]) | st.integers(0, 255)
    return hnp.arrays(kind, st.integers(0, 40), elements=small).map(read_only)


@settings(deadline=None, max_examples=200)
@given(st.data(), st.booleans())
def test_streams_of_any_content_change_nothing_outside_the_array(data: st.DataObject, wide: bool) -> None:
    size = data.draw(st.integers(0, 600))
    around = np.arange(size + 2 * GUARD)
    memory = around.astype(np.uint32) if wide else around.astype(np.uint16)
    before = memory.copy()
    gaps, values = data.draw(stream(np.uint8)), data.draw(stream(np.uint8))
    wide16, wide32 = data.draw(stream(np.uint16)), data.draw(stream(np.uint32))
    at = ulp.start_decoding()
    cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=3)))
    for start, stop in zip([0, *cuts], [*cuts, size], strict=True):
        if not ulp.decode(memory[GUARD + start : GUARD + stop], gaps, values, wide16, wide32, at):
            break
        used, lengths = at[: ulp.CARRIED], [len(gaps), len(values), len(wide16), len(wide32)]
        assert (used <= lengths).all()
        assert (before != memory).sum() <= used[1]
    assert (memory[:GUARD] == before[:GUARD]).all()
    assert (memory[GUARD + size :] == before[GUARD + size :]).all()


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 128, 130])
def test_every_single_change_is_found_where_it_is(count: int) -> None:
    old = read_only(np.full(count, 0x3C00, np.uint16))
    for place in range(count):
        new = old.copy()
        new[place] += 2
        gaps, values = np.zeros(200, np.uint8), np.zeros(200, np.uint8)
        at = ulp.start_encoding()
        ulp.encode(old, read_only(new), gaps, values, np.zeros(0, np.uint16), np.zeros(0, np.uint32), at)
        # One gap byte, as 130 < 255; two ulps up is the zigzag code 4, stored as 3.
        assert (at.tolist(), gaps[0], values[0]) == ([1, 1, 0, 0, count - 1 - place], place, 3)


def test_a_gap_goes_on_from_one_array_to_the_next() -> None:
    old, new = read_only(np.zeros(300, np.uint16)), np.zeros(300, np.uint16)
    new[-1] = 1
    gaps, values = np.zeros(9, np.uint8), np.zeros(9, np.uint8)
    at = ulp.start_encoding()
    for _ in range(2):
        ulp.encode(old, read_only(new), gaps, values, np.zeros(0, np.uint16), np.zeros(0, np.uint32), at)
    # 299 unchanged, then 299 more.
    assert (gaps[:4].tolist(), values[:2].tolist()) == ([255, 44, 255, 44], [1, 1])


def test_where_compiled_code_cannot_be_kept_it_is_compiled_all_the_same() -> None:
    space: dict[str, Callable[[int], int]] = {}
    exec("def double(x):\n    return 2 * x\n", space)  # a function without a file has no folder to keep it in
    assert ulp.compiled(space["double"])(21) == 42
