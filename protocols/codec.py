"""A tree as wire frames and back: a small JSON header the hub reads, then raw little-endian arrays, at most 4.5 bytes
per token. Decoding trusts nothing: whatever is wrong with the frames is a `MalformedTree`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError

from protocols import packing
from protocols.messages import Count, Name
from protocols.packing import MAX_TRAJECTORIES, MAX_TREE_TOKENS, MAX_TURNS, Frame, MalformedTree, TokenBytes
from protocols.records import (
    EpisodeTree,
    Flags,
    Floats,
    Joint,
    Record,
    Replay,
    Status,
    Task,
    Tokens,
    ToolSpan,
    Trajectory,
    Turn,
    WeightStamp,
)

__all__ = ["FRAMES", "Frame", "MalformedTree", "TreeHeader", "decode_header", "decode_tree", "encode_tree"]

Model = TypeVar("Model", bound=Record)

FRAMES: Final = 8
"""header, names, trajectories, turns, tokens, sampled runs, log-probabilities, version runs."""


class TreeHeader(Record):
    """What the hub needs to know of a tree without touching its arrays; `decode_tree` checks it against them."""

    tree_id: Name
    group_id: Name
    lease_id: Name
    episode: Count
    actor_id: Name
    task: Task
    rewards: dict[str, FiniteFloat | None]
    weights: tuple[WeightStamp, ...] = Field(max_length=2**16)
    roles: tuple[str, ...] = Field(min_length=1, max_length=MAX_TRAJECTORIES)
    """Of every trajectory, parents first."""
    statuses: tuple[Status, ...] = Field(max_length=MAX_TRAJECTORIES)
    """Of every trajectory."""
    started_at: FiniteFloat
    """Unix time."""
    seconds: FiniteFloat
    token_count: int = Field(ge=0, le=MAX_TREE_TOKENS)
    sampled_count: Count
    oldest_version: Count | None
    """Oldest weights that sampled a token; None when nothing was sampled."""
    newest_version: Count | None
    tool_calls: Count
    tool_failures: Count
    """Tool calls that ended as an infrastructure failure."""
    token_bytes: TokenBytes
    """How token ids are stored: uint16, uint16 and a plane of high bytes, or int32."""

    @property
    def reward(self) -> float | None:
        """The scalar the policy is trained on; None when the episode could not be scored."""
        return self.rewards.get("total")


class _Names(Record):
    """The strings the array frames refer to, in their order."""

    call_ids: tuple[str, ...] = Field(max_length=MAX_TURNS)
    tool_spans: tuple[ToolSpan, ...] = Field(max_length=MAX_TURNS)
    earned: tuple[FiniteFloat | None, ...] = Field(default=(), max_length=MAX_TRAJECTORIES)
    joints: tuple[Joint, ...] = Field(default=(), max_length=MAX_TURNS)
    replays: tuple[Replay, ...] = Field(default=(), max_length=MAX_TRAJECTORIES)


MAX_TEXT_BYTES: Final = 64 * 2**20
"""Most bytes of a JSON frame; parsed, it takes several times as many."""
_TURNS: Final = TypeAdapter(tuple[Turn, ...])


@dataclass(frozen=True, slots=True)
class _Arrays:
    """Of the whole tree, trajectory after trajectory; the last two have one entry per sampled token."""

    tokens: Tokens
    sampled: Flags
    logprobs: Floats
    versions: Tokens


def encode_tree(tree: EpisodeTree) -> list[bytes]:
    """The frames of a tree, lossless. Raises ValueError for a tree beyond the limits of `protocols.packing`."""
    trajectories = tree.trajectories
    turns = [turn for t in trajectories for turn in t.turns]
    if tree.token_count > MAX_TREE_TOKENS or len(trajectories) > MAX_TRAJECTORIES or len(turns) > MAX_TURNS:
        raise ValueError(
            f"tree {tree.tree_id} has {tree.token_count} tokens, {len(trajectories)} trajectories and {len(turns)}"
            f" turns, more than {MAX_TREE_TOKENS}, {MAX_TRAJECTORIES} or {MAX_TURNS}: lower the roles' limits"
        )
    shared = packing.shared_prefixes(trajectories)
    sampled = np.concatenate([t.sampled for t in trajectories])
    versions = packing.version_runs(np.concatenate([t.versions for t in trajectories], dtype=np.int32))
    width = packing.token_bytes(trajectories)
    header = _header(tree, width, versions[:, 0])
    names = _Names(
        call_ids=tuple(t.call_id for t in turns if t.call_id is not None),
        tool_spans=tree.tool_spans,
        earned=tree.earned,
        joints=tree.joints,
        replays=tree.replays,
    )
    return [
        header.model_dump_json().encode(),
        names.model_dump_json(exclude_defaults=True).encode(),
        packing.pack_trajectories(trajectories, shared),
        packing.pack_turns(turns),
        packing.pack_tokens(trajectories, shared, width),
        packing.pack_sampled(sampled),
        packing.pack_logprobs(trajectories),
        versions.astype("<i4").tobytes(),
    ]


def decode_header(frame: Frame) -> TreeHeader:
    """The header alone, in tens of microseconds. Raises `MalformedTree`."""
    header = _parse(TreeHeader, frame, "header")
    if len(header.statuses) != len(header.roles):
        raise MalformedTree(f"tree header names {len(header.roles)} roles but {len(header.statuses)} statuses")
    return header


def decode_tree(frames: Sequence[Frame]) -> EpisodeTree:
    """Rebuild a tree from its frames, checking all of it before believing any. Raises `MalformedTree`."""
    if len(frames) != FRAMES:
        raise MalformedTree(f"a tree is {FRAMES} frames, got {len(frames)}")
    header = decode_header(frames[0])
    names = _parse(_Names, frames[1], "names frame")
    rows = packing.unpack_trajectories(frames[2], trajectories=len(header.roles), token_count=header.token_count)
    turns = packing.unpack_turns(frames[3], turns=sum(row.turns for row in rows))
    versions = packing.unpack_version_runs(frames[7], sampled_count=header.sampled_count)
    arrays = _Arrays(
        tokens=packing.unpack_tokens(frames[4], header.token_bytes, rows),
        sampled=packing.unpack_sampled(frames[5], token_count=header.token_count),
        logprobs=packing.unpack_logprobs(frames[6], sampled_count=header.sampled_count),
        versions=np.repeat(versions[:, 0], versions[:, 1]),
    )
    _check_header(header, names, versions[:, 0], turns)
    try:
        return _build(header, names, rows, iter(turns), arrays)
    except ValueError as error:
        raise MalformedTree(str(error).partition("\n")[0]) from error


def _header(tree: EpisodeTree, width: TokenBytes, versions: Tokens) -> TreeHeader:
    return TreeHeader(
        tree_id=tree.tree_id,
        group_id=tree.group_id,
        lease_id=tree.lease_id,
        episode=tree.episode,
        actor_id=tree.actor_id,
        task=tree.task,
        rewards=tree.rewards,
        weights=tree.weights,
        roles=tuple(t.role for t in tree.trajectories),
        statuses=tuple(t.status for t in tree.trajectories),
        started_at=tree.started_at,
        seconds=tree.seconds,
        token_count=tree.token_count,
        sampled_count=tree.sampled_count,
        oldest_version=int(versions.min()) if len(versions) else None,
        newest_version=int(versions.max()) if len(versions) else None,
        tool_calls=len(tree.tool_spans),
        tool_failures=_failures(tree.tool_spans),
        token_bytes=width,
    )


def _failures(spans: Sequence[ToolSpan]) -> int:
    return sum(span.outcome == "infrastructure" for span in spans)


def _check_header(header: TreeHeader, names: _Names, versions: Tokens, turns: Sequence[packing.TurnRow]) -> None:
    """What the hub believed without looking at the arrays must be what the arrays say."""
    bounds = (int(versions.min()), int(versions.max())) if len(versions) else (None, None)
    if bounds != (header.oldest_version, header.newest_version):
        raise MalformedTree(f"header says versions {header.oldest_version} to {header.newest_version}, tokens {bounds}")
    counts = (len(names.tool_spans), _failures(names.tool_spans))
    if counts != (header.tool_calls, header.tool_failures):
        raise MalformedTree(
            f"header says {header.tool_calls} tool calls, {header.tool_failures} failed; the names frame says {counts}"
        )
    if sum(row.has_call for row in turns) != len(names.call_ids):
        raise MalformedTree(f"turns do not use the {len(names.call_ids)} call ids of the names frame")


def _build(
    header: TreeHeader,
    names: _Names,
    rows: Sequence[packing.TrajectoryRow],
    turns: Iterator[packing.TurnRow],
    arrays: _Arrays,
) -> EpisodeTree:
    calls = iter(names.call_ids)
    trajectories: list[Trajectory] = []
    start = chosen = 0
    for row, role, status in zip(rows, header.roles, header.statuses, strict=True):
        stop = start + row.length
        sampled = arrays.sampled[start:stop]
        upto = chosen + int(np.count_nonzero(sampled))
        trajectories.append(
            Trajectory(
                role=role,
                parent=None if row.parent == row.parent_turn == -1 else (row.parent, row.parent_turn),
                tokens=arrays.tokens[start:stop],
                sampled=sampled,
                logprobs=arrays.logprobs[chosen:upto],
                versions=arrays.versions[chosen:upto],
                turns=_turns([next(turns) for _ in range(row.turns)], calls),
                status=status,
            )
        )
        start, chosen = stop, upto
    if chosen != header.sampled_count:
        raise MalformedTree(f"sampled runs choose {chosen} tokens, the header says {header.sampled_count}")
    return EpisodeTree(
        tree_id=header.tree_id,
        group_id=header.group_id,
        lease_id=header.lease_id,
        episode=header.episode,
        actor_id=header.actor_id,
        task=header.task,
        trajectories=tuple(trajectories),
        rewards=header.rewards,
        weights=header.weights,
        tool_spans=names.tool_spans,
        started_at=header.started_at,
        seconds=header.seconds,
        earned=names.earned,
        joints=names.joints,
        replays=names.replays,
    )


def _turns(rows: Sequence[packing.TurnRow], calls: Iterator[str]) -> tuple[Turn, ...]:
    fields: list[dict[str, str | int | None]] = []
    start = 0
    for length, kind, stop, has_call in rows:
        fields.append(
            {
                "kind": packing.KINDS[kind],
                "start": start,
                "stop": start + length,
                "call_id": next(calls) if has_call else None,
                "stop_reason": packing.STOPS[stop],
            }
        )
        start += length
    return _TURNS.validate_python(fields)


def _parse(model: type[Model], frame: Frame, what: str) -> Model:
    if len(frame) > MAX_TEXT_BYTES:
        raise MalformedTree(f"tree {what} of {len(frame)} bytes; at most {MAX_TEXT_BYTES}")
    try:
        return model.model_validate_json(bytes(frame))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise MalformedTree(f"tree {what} {where}: {first['msg']}") from error
