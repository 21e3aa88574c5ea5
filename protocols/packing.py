"""The arrays of a tree as bytes and back: runs for flags and versions, narrow token ids, shared prefixes stored once.
Sizes and ranges are checked before anything is allocated; what does not fit is a `MalformedTree`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from protocols.records import Flags, Floats, StopReason, Tokens, Trajectory, Turn, TurnKind

Frame = bytes | memoryview
TokenBytes = Literal[2, 3, 4]
Number = TypeVar("Number", bound=np.generic)

MAX_TREE_TOKENS: Final = 1 << 24
"""Most tokens of one tree; shared prefixes multiply what a few bytes stand for, so it is checked before allocating."""
MAX_TRAJECTORIES: Final = 1 << 13
MAX_TURNS: Final = 1 << 18

KINDS: Final[tuple[TurnKind, ...]] = get_args(TurnKind)
STOPS: Final[tuple[StopReason | None, ...]] = (None, *get_args(StopReason))
_KIND_CODE: Final = {kind: code for code, kind in enumerate(KINDS)}
_STOP_CODE: Final = {stop: code for code, stop in enumerate(STOPS)}


class MalformedTree(ValueError):
    """The frames are not a tree; the message says which part and why."""


@dataclass(frozen=True, slots=True)
class TrajectoryRow:
    """A row of the trajectory frame, all int32."""

    parent: int
    """-1 for none, as is `parent_turn`."""
    parent_turn: int
    length: int
    turns: int
    source: int
    """Earlier trajectory whose first `shared` tokens this one repeats; -1 for none."""
    shared: int


class TurnRow(NamedTuple):
    """A row of the turn frame, all int32."""

    length: int
    kind: int
    """Index into `KINDS`."""
    stop: int
    """Index into `STOPS`."""
    has_call: int
    """1 when the next call id of the names frame is this turn's."""


def pack_trajectories(trajectories: Sequence[Trajectory], shared: Sequence[tuple[int, int]]) -> bytes:
    """The trajectory frame; `shared` comes from `shared_prefixes`."""
    rows = [
        (*(t.parent or (-1, -1)), len(t.tokens), len(t.turns), *link)
        for t, link in zip(trajectories, shared, strict=True)
    ]
    return np.array(rows, dtype="<i4").tobytes()


def pack_turns(turns: Sequence[Turn]) -> bytes:
    """The turn frame, the turns of all trajectories one after the other."""
    rows = [(t.stop - t.start, _KIND_CODE[t.kind], _STOP_CODE[t.stop_reason], t.call_id is not None) for t in turns]
    return np.array(rows, dtype="<i4").tobytes()


def unpack_trajectories(frame: Frame, *, trajectories: int, token_count: int) -> list[TrajectoryRow]:
    """Rows whose lengths add up and whose shared prefixes lie in earlier trajectories."""
    rows = [
        TrajectoryRow(*row)
        for row in array(frame, np.int32, "trajectory frame", length=6 * trajectories).reshape(-1, 6).tolist()
    ]
    for index, row in enumerate(rows):
        if row.length < 0 or row.turns < 0 or not 0 <= row.shared <= row.length:
            raise MalformedTree(
                f"trajectory {index} claims {row.length} tokens, {row.turns} turns and {row.shared} shared tokens"
            )
        if row.shared and not (0 <= row.source < index and row.shared <= rows[row.source].length):
            raise MalformedTree(f"trajectory {index} cannot share {row.shared} tokens with trajectory {row.source}")
    if sum(row.length for row in rows) != token_count:
        raise MalformedTree(f"trajectory lengths do not add up to the header's {token_count} tokens")
    return rows


def unpack_turns(frame: Frame, *, turns: int) -> list[TurnRow]:
    """Rows with every code in range."""
    if turns > MAX_TURNS:
        raise MalformedTree(f"{turns} turns; a tree holds at most {MAX_TURNS}")
    rows = array(frame, np.int32, "turn frame", length=4 * turns).reshape(-1, 4)
    limits = np.array([MAX_TREE_TOKENS, len(KINDS) - 1, len(STOPS) - 1, 1])
    if not ((rows >= 0) & (rows <= limits)).all():
        raise MalformedTree("turn frame holds a length, kind, stop reason or call flag out of range")
    return list(map(TurnRow._make, rows.tolist()))


def shared_prefixes(trajectories: Sequence[Trajectory]) -> list[tuple[int, int]]:
    """For each, (earlier trajectory, tokens it shares from the start), or (-1, 0).

    Compared with the first and the latest of the same role, and with a parent of that role: the first shares the prompt
    of every worker; the others nearly everything where a workflow records one trajectory per turn.
    """
    first: dict[str, int] = {}
    latest: dict[str, int] = {}
    links: list[tuple[int, int]] = []
    for index, mine in enumerate(trajectories):
        best = (-1, 0)
        parent = index
        if mine.parent is not None and trajectories[mine.parent[0]].role == mine.role:
            parent = mine.parent[0]
        for candidate in {first.setdefault(mine.role, index), latest.get(mine.role, index), parent} - {index}:
            common = _common_prefix(trajectories[candidate].tokens, mine.tokens)
            if common > best[1]:
                best = (candidate, common)
        latest[mine.role] = index
        links.append(best)
    return links


def _common_prefix(one: Tokens, other: Tokens) -> int:
    length = min(len(one), len(other))
    if length == 0 or one[0] != other[0]:
        return 0
    different = one[:length] != other[:length]
    first = int(different.argmax())
    return first if different[first] else length


def token_bytes(trajectories: Sequence[Trajectory]) -> TokenBytes:
    """The narrowest way to store these ids."""
    largest = max((int(t.tokens.max()) for t in trajectories if len(t.tokens)), default=0)
    if largest < 1 << 16:
        return 2
    return 3 if largest < 1 << 24 else 4


def pack_tokens(trajectories: Sequence[Trajectory], shared: Sequence[tuple[int, int]], width: TokenBytes) -> bytes:
    """What no prefix covers, as uint16 · uint16 and then a plane of high bytes · int32."""
    own = [t.tokens[prefix:] for t, (_, prefix) in zip(trajectories, shared, strict=True)]
    if width == 4:
        return np.concatenate(own, dtype="<i4", casting="same_kind").tobytes()
    count = sum(map(len, own))
    raw = np.empty(count * width, dtype=np.uint8)
    low, high = raw[: 2 * count].view("<u2"), raw[2 * count :]
    # One trajectory at a time stays in the cache: six times as fast as on all tokens at once.
    at = 0
    for tokens in own:
        low[at : at + len(tokens)] = tokens
        if width == 3:
            high[at : at + len(tokens)] = tokens >> 16
        at += len(tokens)
    return raw.tobytes()


def unpack_tokens(frame: Frame, width: TokenBytes, rows: Sequence[TrajectoryRow]) -> Tokens:
    """Token ids of every trajectory, each with its own copy of the prefix it shares."""
    count = sum(row.length - row.shared for row in rows)
    if width == 4:
        unique = array(frame, np.int32, "token frame", length=count).astype(np.int32)
    else:
        raw = array(frame, np.uint8, "token frame", length=count * width)
        unique = raw[: 2 * count].view("<u2").astype(np.int32)
        if width == 3:
            unique |= raw[2 * count :].astype(np.int32) << 16
    total = sum(row.length for row in rows)
    return unique if total == count else _repeat_prefixes(unique, rows, total)


def _repeat_prefixes(unique: Tokens, rows: Sequence[TrajectoryRow], total: int) -> Tokens:
    tokens = np.empty(total, dtype=np.int32)
    starts: list[int] = []
    start = taken = 0
    for row in rows:
        starts.append(start)
        own, stop = row.length - row.shared, start + row.length
        if row.shared:
            source = starts[row.source]
            tokens[start : start + row.shared] = tokens[source : source + row.shared]
        tokens[start + row.shared : stop] = unique[taken : taken + own]
        start, taken = stop, taken + own
    return tokens


def pack_sampled(sampled: Flags) -> bytes:
    """Alternating run lengths (uint32), the first of tokens that were not sampled."""
    edges = np.flatnonzero(sampled[1:] != sampled[:-1]) + 1
    first = [0, 0] if len(sampled) and sampled[0] else [0]
    return np.diff(np.concatenate([first, edges, [len(sampled)]])).astype("<u4").tobytes()


def unpack_sampled(frame: Frame, *, token_count: int) -> Flags:
    """The flags of all tokens."""
    runs = array(frame, np.uint32, "sampled-run frame")
    if len(runs) > token_count + 2:  # only the first may be empty
        raise MalformedTree(f"{len(runs)} sampled runs of {token_count} tokens")
    if int(runs.sum(dtype=np.uint64)) != token_count:
        raise MalformedTree(f"sampled runs do not add up to the header's {token_count} tokens")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs)


def version_runs(versions: Tokens) -> NDArray[np.int32]:
    """Rows (version, how many sampled tokens in a row have it)."""
    if not len(versions):
        return np.zeros((0, 2), dtype=np.int32)
    starts = np.concatenate([[0], np.flatnonzero(versions[1:] != versions[:-1]) + 1])
    return np.stack([versions[starts], np.diff(starts, append=len(versions))], axis=1).astype(np.int32)


def unpack_version_runs(frame: Frame, *, sampled_count: int) -> NDArray[np.int32]:
    """Rows as above, checked but not yet repeated."""
    flat = array(frame, np.int32, "version-run frame")
    if len(flat) % 2:
        raise MalformedTree("version-run frame is not pairs of version and count")
    rows = flat.reshape(-1, 2)
    if len(rows) and (int(rows[:, 0].min()) < 0 or int(rows[:, 1].min()) < 1):
        raise MalformedTree("version-run frame holds a negative version or an empty run")
    if int(rows[:, 1].sum(dtype=np.int64)) != sampled_count:
        raise MalformedTree(f"version runs do not add up to the header's {sampled_count} sampled tokens")
    return rows.astype(np.int32)


def pack_logprobs(trajectories: Sequence[Trajectory]) -> bytes:
    """One float32 per sampled token."""
    return b"".join([np.ascontiguousarray(t.logprobs, dtype="<f4").data for t in trajectories])


def unpack_logprobs(frame: Frame, *, sampled_count: int) -> Floats:
    """One float32 per sampled token; its values are checked by `Trajectory`."""
    return array(frame, np.float32, "log-probability frame", length=sampled_count).astype(np.float32)


def array(frame: Frame, dtype: type[Number], what: str, *, length: int | None = None) -> NDArray[Number]:
    """A view of the frame as little-endian numbers; of exactly `length` of them if given."""
    size, width = memoryview(frame).nbytes, np.dtype(dtype).itemsize
    if size % width or (length is not None and size != length * width):
        expected = f"a multiple of {width}" if length is None else str(length * width)
        raise MalformedTree(f"tree {what} is {size} bytes, expected {expected}")
    return np.frombuffer(frame, dtype=np.dtype(dtype).newbyteorder("<"))
