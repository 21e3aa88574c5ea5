"""An object arrives whole whatever order, number and shape its chunks come in."""

from __future__ import annotations

from pathlib import Path

import anyio
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.weights.download import CHUNKS_IN_FLIGHT, BrokenTransfer, Download
from protocols.messages import Chunk, ChunkRequest, WeightObject
from protocols.weights import file_digest

CONTENT = np.random.default_rng(0).bytes(20 * 100 + 7)


class Asked:
    """Remembers what was asked for, in order."""

    def __init__(self) -> None:
        self.requests: list[ChunkRequest] = []

    async def send(self, message: ChunkRequest) -> bool:
        self.requests.append(message)
        return True

    async def wait_connected(self) -> None:
        raise AssertionError("never away")


def object_of(folder: Path) -> WeightObject:
    source = folder / "source"
    source.write_bytes(CONTENT)
    digest = file_digest(source)
    return WeightObject(name="k", kind="keyframe", version=0, base=None, size_bytes=len(CONTENT), digest=digest)


def part(request: ChunkRequest) -> memoryview:
    return memoryview(CONTENT)[request.offset : request.offset + request.size_bytes]


@given(order=st.lists(st.integers(0, CHUNKS_IN_FLIGHT - 1), max_size=60), chunk_bytes=st.sampled_from([100, 512, 4096]))
@settings(max_examples=40, deadline=None)
def test_chunks_in_any_order_twice_cut_short_or_never_asked_for_make_the_file(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], chunk_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("download")

    async def pull() -> None:
        uplink, choices = Asked(), iter(order)
        with Download(object_of(folder), folder / "copy", chunk_bytes=chunk_bytes) as download:
            waiting: list[ChunkRequest] = []
            while not download.complete:
                before = len(uplink.requests)
                await download.ask(uplink)
                waiting += uplink.requests[before:]
                assert len(waiting) <= CHUNKS_IN_FLIGHT
                request = waiting.pop(next(choices, 0) % len(waiting))
                chunk = Chunk(name="k", offset=request.offset)
                assert not download.take(chunk, part(request)[:-1])
                assert not download.take(Chunk(name="other", offset=request.offset), part(request))
                assert not download.take(Chunk(name="k", offset=request.offset + 1), part(request))
                assert download.take(chunk, part(request))
                assert not download.take(chunk, part(request))
            await download.check()

    anyio.run(pull)
    assert (folder / "copy").read_bytes() == CONTENT


async def test_wrong_bytes_are_found_at_the_end(tmp_path: Path) -> None:
    uplink = Asked()
    with Download(object_of(tmp_path), tmp_path / "copy") as download:
        await download.ask(uplink)
        (request,) = uplink.requests
        assert download.take(Chunk(name="k", offset=0), memoryview(bytes(request.size_bytes)))
        with pytest.raises(BrokenTransfer, match="k has digest"):
            await download.check()


async def test_a_slow_line_is_not_asked_again_and_again(tmp_path: Path) -> None:
    uplink = Asked()
    with Download(object_of(tmp_path), tmp_path / "copy", patience_s=0.0, chunk_bytes=100) as download:
        await download.ask(uplink)
        assert len(uplink.requests) == 8
        await download.ask(uplink)  # nothing came within the patience: once more
        assert len(uplink.requests) == 16
        download.patience_s = 60.0
        assert download.take(Chunk(name="k", offset=0), part(uplink.requests[0]))
        await download.ask(uplink)
        assert len(uplink.requests) == 17  # the one that has room now
