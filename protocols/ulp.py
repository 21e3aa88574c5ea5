"""The inner loops of the weight delta, compiled by numba: find the elements whose bits changed and by how many ulps,
and move them there. A part's elements may lie in several arrays: a cursor carries the loops from one to the next.

Compiled at first use (about a second) and kept beside this file, or in the user's cache folder where this one is
read-only; where neither can be written every process compiles anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ParamSpec, Protocol, TypeVar, cast

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.typing.context import BaseContext
from numba.core.typing.templates import Signature
from numba.extending import intrinsic
from numpy.typing import NDArray

P = ParamSpec("P")
R = TypeVar("R")
Bytes = NDArray[np.uint8]
Bits = NDArray[np.uint16] | NDArray[np.uint32]
Emit = Callable[["_Target", ir.IRBuilder, Signature, Sequence[ir.Value]], ir.Value]
Cursor = NDArray[np.int64]
"""How far the loops are in gaps, values, wide16 and wide32, and (CARRIED) how many unchanged elements were passed since
the last change when encoding, or are still to be passed before the next when decoding."""

CARRIED = 4
SKIP = 255
"""A gap byte: 255 unchanged elements, and more to come."""
WIDE16, WIDE32 = 254, 255
"""A value byte: the zigzag ulp difference is in the uint16, or the uint32, stream."""
_NO_GAP_READ = -1
_LANES = 64


def start_encoding() -> Cursor:
    """The cursor before a part's first element."""
    return np.zeros(5, dtype=np.int64)


def start_decoding() -> Cursor:
    """The cursor before a part's first element."""
    return np.array([0, 0, 0, 0, _NO_GAP_READ], dtype=np.int64)


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """The function in machine code, run without the interpreter's lock."""
    try:
        made: Callable[P, R] = njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder to keep it in
        made = njit(nogil=True)(function)
    return made


class _Target(Protocol):
    """What is used here of the machine that numba compiles for."""

    def get_data_type(self, kind: types.Type) -> ir.Type: ...

    def make_array(self, kind: types.Array) -> Callable[[_Target, ir.IRBuilder, ir.Value], ir.Value]: ...


def _emit_changed_lanes(
    _typing: BaseContext, old: types.Array, new: types.Array, start: types.Type
) -> tuple[Signature, Emit]:
    """Machine code that numba does not find by itself: a few vector instructions."""

    def emit(context: _Target, builder: ir.IRBuilder, signature: Signature, values: Sequence[ir.Value]) -> ir.Value:
        item = context.get_data_type(old.dtype)
        loaded = []
        for kind, value in zip(signature.args[:2], values[:2], strict=True):
            first = builder.gep(context.make_array(kind)(context, builder, value).data, [values[2]])
            lanes = builder.load(builder.bitcast(first, ir.VectorType(item, _LANES).as_pointer()))
            lanes.align = 2  # a mapped file promises no more
            loaded.append(lanes)
        return builder.bitcast(builder.icmp_unsigned("!=", *loaded), ir.IntType(_LANES))

    return types.uint64(old, new, types.intp), emit


def _emit_lowest_set(_typing: BaseContext, mask: types.Type) -> tuple[Signature, Emit]:
    def emit(_context: _Target, builder: ir.IRBuilder, _signature: Signature, values: Sequence[ir.Value]) -> ir.Value:
        return builder.cttz(values[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), emit


_changed_lanes = cast(Callable[[Bits, Bits, int], np.uint64], intrinsic(_emit_changed_lanes))
"""Of the 64 elements from a place: bit i is set if element i of the two arrays differs."""
_lowest_set = cast(Callable[[np.uint64], int], intrinsic(_emit_lowest_set))
"""Place of the lowest set bit of a mask that is not 0."""


@compiled
def _ordered(bits: np.uint16 | np.uint32, width: int) -> np.int64:
    """The bit pattern of a float as an integer in the floats' order, neighbours one apart; one to one: -0 is not 0."""
    wide, sign = np.int64(bits), np.int64(1) << (width - 1)
    if wide & sign:
        return 2 * sign - 1 - wide
    return wide | sign


@compiled
def encode(
    old: Bits, new: Bits, gaps: Bytes, values: Bytes, wide16: NDArray[np.uint16], wide32: NDArray[np.uint32], at: Cursor
) -> None:
    """Append what turns `old` into `new` to the streams, and move the cursor.

    The caller gives both arrays the same length and leaves room in the streams for every element to change, and for a
    gap byte per 255 elements more.
    """
    count, width = len(old), 8 * old.itemsize
    half = np.int64(1) << (width - 1)
    full = 2 * half - 1
    g, v, w, x = at[0], at[1], at[2], at[3]
    last = -1 - at[CARRIED]
    for start in range(0, count, _LANES):
        if start + _LANES <= count:
            mask = _changed_lanes(old, new, start)
        else:
            mask = np.uint64(0)
            for place in range(start, count):
                if old[place] != new[place]:
                    mask |= np.uint64(1) << np.uint64(place - start)
        while mask:
            place = start + _lowest_set(mask)
            mask &= mask - np.uint64(1)
            distance = place - last - 1
            last = place
            while distance >= SKIP:
                gaps[g] = SKIP
                g += 1
                distance -= SKIP
            gaps[g] = distance
            g += 1
            # Zigzag (-1, 1, -2, … as 0, 1, 2, …) of the difference modulo 2^width, so that it has `width` bits too.
            moved = ((_ordered(new[place], width) - _ordered(old[place], width) + half) & full) - half
            code = ((moved << 1) ^ (moved >> 63)) - 1
            if code < WIDE16:
                values[v] = code
            elif code <= 0xFFFF:
                values[v] = WIDE16
                wide16[w] = code
                w += 1
            else:
                values[v] = WIDE32
                wide32[x] = code
                x += 1
            v += 1
    at[0], at[1], at[2], at[3], at[CARRIED] = g, v, w, x, count - 1 - last


@compiled
def decode(
    bits: Bits, gaps: Bytes, values: Bytes, wide16: NDArray[np.uint16], wide32: NDArray[np.uint32], at: Cursor
) -> bool:
    """Make the changes that fall into `bits`, and move the cursor. False if a stream ends where it must not.

    Whatever the streams hold, nothing beyond the arrays is read or written.
    """
    count, width = len(bits), 8 * bits.itemsize
    half = np.int64(1) << (width - 1)
    full = 2 * half - 1
    g, v, w, x, ahead = at[0], at[1], at[2], at[3], at[CARRIED]
    place = 0
    while v < len(values):
        if ahead == _NO_GAP_READ:
            ahead = np.int64(0)
            step = np.int64(SKIP)
            while step == SKIP:
                if g >= len(gaps):
                    return False
                step = np.int64(gaps[g])
                g += 1
                ahead += step
        if ahead >= count - place:
            ahead -= count - place
            break
        place += ahead
        code = np.int64(values[v])
        v += 1
        if code == WIDE16:
            if w >= len(wide16):
                return False
            code = np.int64(wide16[w])
            w += 1
        elif code == WIDE32:
            if x >= len(wide32):
                return False
            code = np.int64(wide32[x])
            x += 1
        moved = ((code + 1) >> 1) ^ -((code + 1) & 1)
        key = (_ordered(bits[place], width) + moved) & full
        bits[place] = key ^ half if key & half else full - key
        place += 1
        ahead = np.int64(_NO_GAP_READ)
    at[0], at[1], at[2], at[3], at[CARRIED] = g, v, w, x, ahead
    return True
