"""Weight files: bit-exact, atomic, and never applied to what they were not made for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from protocols.delta import BadDelta, apply_delta, patch_weights, write_delta
from protocols.messages import WeightObject
from protocols.weights import (
    BadWeights,
    Tensor,
    Weights,
    covering,
    file_digest,
    read_keyframe,
    weights_digest,
    write_atomically,
    write_keyframe,
)

# The file is rewritten by every example: sharing the folder between them is what is meant.
relaxed = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9)
bits16 = hnp.arrays(np.uint16, shapes)
bits32 = hnp.arrays(np.uint32, shapes)


def bfloat16(bits: list[int] | np.ndarray[tuple[int, ...], np.dtype[np.uint16]]) -> Tensor:
    return Tensor("bfloat16", np.array(bits, dtype=np.uint16))


def float32(values: list[float]) -> Tensor:
    return Tensor("float32", np.array(values, dtype=np.float32))


@st.composite
def weights(draw: st.DrawFn) -> Weights:
    """Any bit patterns: NaNs, infinities, both zeros, empty and zero-dimensional tensors."""
    made: dict[str, Tensor] = {}
    for name in draw(st.lists(st.text(min_size=1, max_size=6), max_size=4, unique=True)):
        if draw(st.booleans()):
            made[name] = Tensor("bfloat16", draw(bits16))
        else:
            made[name] = Tensor("float32", draw(bits32).view(np.float32))
    return made


@st.composite
def changed(draw: st.DrawFn, base: Weights) -> Weights:
    """The same tensors with some elements set to other bit patterns."""
    made: dict[str, Tensor] = {}
    for name, tensor in base.items():
        data = tensor.data.copy()
        flat = data.reshape(-1).view(np.uint16 if tensor.dtype == "bfloat16" else np.uint32)
        top = 256**flat.itemsize - 1
        if flat.size:
            for _ in range(draw(st.integers(0, 4))):
                near = int(flat[at := draw(st.integers(0, flat.size - 1))]) + draw(st.integers(-300, 300))
                flat[at] = draw(st.sampled_from([near % (top + 1), draw(st.integers(0, top))]))
        made[name] = Tensor(tensor.dtype, data)
    return made


def same(one: Weights, other: Weights) -> bool:
    return weights_digest(one) == weights_digest(other) and set(one) == set(other)


@relaxed
@given(weights())
def test_a_keyframe_gives_back_every_bit(tmp_path: Path, original: Weights) -> None:
    made = write_keyframe(tmp_path / "k", original, version=3)
    assert (made.version, made.base, made.size_bytes) == (3, None, (tmp_path / "k").stat().st_size)
    assert made.digest == file_digest(tmp_path / "k")
    assert same(read_keyframe(tmp_path / "k"), original)


def test_a_keyframe_is_laid_out_as_safetensors_are(tmp_path: Path) -> None:
    write_keyframe(tmp_path / "k", {"b": bfloat16([1, 2, 3]), "a": float32([1.0])}, version=1)
    raw = (tmp_path / "k").read_bytes()
    header = int.from_bytes(raw[:8], "little")
    assert b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}' in raw[8 : 8 + header]
    assert b'"b":{"dtype":"BF16","shape":[3],"data_offsets":[4,10]}' in raw[8 : 8 + header]
    assert raw[8 + header :] == np.float32(1.0).tobytes() + np.array([1, 2, 3], "<u2").tobytes()


def test_keyframe_tensors_are_mapped_and_cannot_be_changed(tmp_path: Path) -> None:
    write_keyframe(tmp_path / "k", {"a": float32([1.0, 2.0])}, version=1)
    with pytest.raises(ValueError, match="read-only"):
        read_keyframe(tmp_path / "k")["a"].data[0] = 3.0


def test_a_tensor_that_another_tool_laid_out_off_its_alignment_is_read_all_the_same(tmp_path: Path) -> None:
    header = (
        b'{"a":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]},"b":{"dtype":"F32","shape":[2],"data_offsets":[2,10]}}'
    )
    body = np.uint16(7).tobytes() + np.array([1.0, 2.0], dtype="<f4").tobytes()
    (tmp_path / "k").write_bytes(len(header).to_bytes(8, "little") + header + body)
    read = read_keyframe(tmp_path / "k")
    assert read["b"].data.flags.aligned
    assert same(read, {"a": bfloat16([7]), "b": float32([1.0, 2.0])})


def test_writing_leaves_no_draft_behind_and_replaces_the_old_file_whole(tmp_path: Path) -> None:
    write_keyframe(tmp_path / "k", {"a": float32([1.0])}, version=1)
    mapped = read_keyframe(tmp_path / "k")
    write_keyframe(tmp_path / "k", {"a": float32([2.0])}, version=2)
    assert [path.name for path in tmp_path.iterdir()] == ["k"]
    assert (mapped["a"].data[0], read_keyframe(tmp_path / "k")["a"].data[0]) == (1.0, 2.0)


@relaxed
@given(st.data())
def test_a_damaged_keyframe_is_bad_weights_and_nothing_else(tmp_path: Path, data: st.DataObject) -> None:
    write_keyframe(tmp_path / "k", {"a": float32([1.0, 2.0]), "b": bfloat16([1, 2, 3])}, version=1)
    raw = bytearray((tmp_path / "k").read_bytes())
    if data.draw(st.booleans()):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    else:
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    (tmp_path / "k").write_bytes(raw)
    try:
        read_keyframe(tmp_path / "k")
    except BadWeights as error:
        assert "weight file" in str(error)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}}', "'a' is F16"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "claims bytes 0 to 4"),
        (b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}', "claims bytes 0 to 36 of 8"),
        (b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', "damaged header"),
        (b"[]", "damaged header"),
    ],
)
def test_a_keyframe_we_cannot_use_says_why(tmp_path: Path, header: bytes, message: str) -> None:
    (tmp_path / "k").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(BadWeights, match=message):
        read_keyframe(tmp_path / "k")


@relaxed
@given(st.data())
def test_a_delta_turns_the_base_into_the_target_bit_for_bit(tmp_path: Path, data: st.DataObject) -> None:
    base = data.draw(weights())
    target = data.draw(changed(base))
    before = weights_digest(base)
    threads, part = data.draw(st.sampled_from([1, 3])), data.draw(st.sampled_from([1, 3, 64, 100, 2**23]))
    made = write_delta(tmp_path / "d", base, target, base_version=4, version=5, threads=threads, part_elements=part)
    assert (made.kind, made.base, made.version, made.digest) == ("delta", 4, 5, file_digest(tmp_path / "d"))
    assert same(apply_delta(tmp_path / "d", base, base_version=4, threads=threads), target)
    assert weights_digest(base) == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (0x0000, 0x8000),  # +0 to -0: equal as numbers, not as bits
        (0x3F80, 0x3F81),  # one ulp up
        (0x7F80, 0xFF80),  # infinity to minus infinity
        (0x7FC0, 0x7FC1),  # one NaN to another
        (0x0000, 0xFFFF),
        (0xFFFF, 0x7FFF),
    ],
)
@pytest.mark.parametrize("at", [0, 3, 254, 255, 256, 1019])
def test_every_kind_of_change_survives_wherever_it_is(tmp_path: Path, old: int, new: int, at: int) -> None:
    bits = np.full(1020, old, dtype=np.uint16)
    base = {"w": bfloat16(bits)}
    bits[at] = new
    write_delta(tmp_path / "d", base, {"w": bfloat16(bits)}, base_version=1, version=2)
    assert same(apply_delta(tmp_path / "d", base, base_version=1), {"w": bfloat16(bits)})


def test_a_delta_at_rl_density_is_two_hundred_times_smaller_than_the_weights(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    old = random.integers(0x3C00, 0x3E00, 2**20, dtype=np.uint16)
    step = random.choice(np.array([-1, 1], dtype=np.int32), 2**20)
    new = np.where(random.random(2**20) < 0.0035, old + step, old).astype(np.uint16)
    made = write_delta(tmp_path / "d", {"w": bfloat16(old)}, {"w": bfloat16(new)}, base_version=1, version=2)
    # 1048576 elements · 0.0035 · (9.7 bits of position + 1 of sign) = 4.9 kB, of 2 MiB dense.
    assert 2**21 / made.size_bytes > 200


BASE: Weights = {"a": bfloat16(list(range(2000))), "b": float32([1.0, 2.0])}
TARGET: Weights = {"a": bfloat16([*range(1990), *range(10)]), "b": float32([1.0, 3.0])}


def test_a_delta_out_of_order_is_refused(tmp_path: Path) -> None:
    write_delta(tmp_path / "d", BASE, TARGET, base_version=1, version=2)
    with pytest.raises(BadDelta, match="turns version 1 into 2, but version 2 is held"):
        apply_delta(tmp_path / "d", TARGET, base_version=2)


def test_a_delta_for_other_weights_of_the_same_version_is_refused(tmp_path: Path) -> None:
    write_delta(tmp_path / "d", BASE, TARGET, base_version=1, version=2)
    with pytest.raises(BadDelta, match="was made for other weights of version 1; pull the keyframe"):
        apply_delta(tmp_path / "d", TARGET, base_version=1)


def test_weights_are_patched_where_they_lie(tmp_path: Path) -> None:
    write_delta(tmp_path / "d", BASE, TARGET, base_version=1, version=2)
    mine = {name: Tensor(tensor.dtype, tensor.data.copy()) for name, tensor in BASE.items()}
    arrays = {name: tensor.data for name, tensor in mine.items()}
    patch_weights(tmp_path / "d", mine, base_version=1)
    assert same(mine, TARGET)
    assert all(mine[name].data is array for name, array in arrays.items())


@pytest.mark.parametrize("known", [None, weights_digest(BASE)])
def test_patched_weights_are_checked_whether_or_not_their_digest_is_known(tmp_path: Path, known: str | None) -> None:
    write_delta(tmp_path / "d", BASE, TARGET, base_version=1, version=2)
    mine = {name: Tensor(tensor.dtype, tensor.data.copy()) for name, tensor in BASE.items()}
    assert patch_weights(tmp_path / "d", mine, base_version=1, base_digest=known) == weights_digest(TARGET)
    mine = {name: Tensor(tensor.dtype, tensor.data.copy()) for name, tensor in BASE.items()}
    mine["a"].data[7] += 1
    message = "made for other weights" if known is None else "gives another tensor 'a'"
    with pytest.raises(BadDelta, match=message):
        patch_weights(tmp_path / "d", mine, base_version=1, base_digest=known)
    with pytest.raises(BadDelta, match="made for other weights"):
        patch_weights(tmp_path / "d", mine, base_version=1, base_digest="0" * 32)


def test_weights_that_cannot_be_written_are_not_patched(tmp_path: Path) -> None:
    write_keyframe(tmp_path / "k", BASE, version=1)
    write_delta(tmp_path / "d", BASE, TARGET, base_version=1, version=2)
    with pytest.raises(ValueError, match="2 tensors are read-only, first 'b': patch a copy"):
        patch_weights(tmp_path / "d", read_keyframe(tmp_path / "k"), base_version=1)


def test_weights_that_begin_at_any_multiple_of_their_own_size_have_a_delta(tmp_path: Path) -> None:
    raw = np.arange(2000, dtype=np.uint16)
    odd: Weights = {"a": Tensor("bfloat16", raw[1:]), "b": Tensor("bfloat16", raw[7:])}
    moved: Weights = {"a": Tensor("bfloat16", raw[1:] + np.uint16(1)), "b": Tensor("bfloat16", raw[7:] ^ np.uint16(1))}
    write_delta(tmp_path / "d", odd, moved, base_version=1, version=2, part_elements=333)
    assert same(apply_delta(tmp_path / "d", odd, base_version=1), moved)


def test_weights_with_other_tensors_have_no_delta(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="differ in the tensors they have, first 'b'"):
        write_delta(tmp_path / "d", BASE, {"a": BASE["a"]}, base_version=1, version=2)


@settings(relaxed, max_examples=300)
@given(st.data())
def test_a_damaged_delta_is_refused_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    part = data.draw(st.sampled_from([700, 2**23]))
    write_delta(tmp_path / "d", BASE, TARGET, base_version=1, version=2, part_elements=part)
    raw = bytearray((tmp_path / "d").read_bytes())
    match data.draw(st.sampled_from(["flip", "cut", "extend"])):
        case "flip":
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        case "cut":
            del raw[data.draw(st.integers(0, len(raw) - 1)) :]
        case _:
            raw += data.draw(st.binary(min_size=1, max_size=8))
    (tmp_path / "d").write_bytes(raw)
    try:
        assert same(apply_delta(tmp_path / "d", BASE, base_version=1), TARGET)
    except BadDelta as error:
        assert "pull the keyframe" in str(error)


def item(version: int, base: int | None, size: int, name: str = "") -> WeightObject:
    kind = "keyframe" if base is None else "delta"
    return WeightObject(
        name=name or f"{base}-{version}", kind=kind, version=version, base=base, size_bytes=size, digest="x"
    )


@pytest.mark.parametrize(
    ("held", "names"),
    [
        (None, ["None-0", "0-4"]),  # 100 + 9, not the chain of 100 + 3 + 3 + 3 + 3
        (0, ["0-4"]),
        (1, ["1-2", "2-3", "3-4"]),
        (3, ["3-4"]),
        (4, []),
        (77, ["None-0", "0-4"]),  # weights nobody can build on
    ],
)
def test_the_covering_chain_has_the_fewest_bytes(held: int | None, names: list[str]) -> None:
    objects = [item(0, None, 100), item(0 + 1, 0, 3), item(2, 1, 3), item(3, 2, 3), item(4, 3, 3), item(4, 0, 9)]
    assert [chosen.name for chosen in covering(objects, held)] == names


def test_a_keyframe_is_chosen_where_deltas_do_not_win() -> None:
    objects = [item(0, None, 100), item(1, 0, 120), item(1, None, 100)]
    assert [chosen.name for chosen in covering(objects, 0)] == ["None-1"]


def test_weights_that_cannot_be_reached_are_an_error() -> None:
    with pytest.raises(ValueError, match="from version None to 5; a keyframe is missing"):
        covering([item(5, 4, 1)], None)


def test_the_newest_weights_need_nothing() -> None:
    assert covering([], 3) == []


def test_a_write_that_fails_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    def parts() -> Iterator[bytes]:
        yield b"half"
        raise OSError("disk full")

    write_atomically(tmp_path / "k", [b"whole"])
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "k", parts())
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("k", b"whole")]
