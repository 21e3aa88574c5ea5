"""The client's HTTP: any cut of the bytes, kept and broken connections, hundreds at once; and rows of replies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from itertools import pairwise

import anyio
import anyio.lowlevel
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.engines.sglang.answers import BadAnswer, parse_answer
from actors.engines.sglang.http import BadReply, Broken, HttpClient, Refused, Reply

Answer = Callable[[bytes, asyncio.StreamWriter], Awaitable[bool]]
"""Replies to the request with this body; false ends the connection."""
OK = b"HTTP/1.1 200 OK\r\n"


class Server:
    """A server that answers as its test says, and counts connections."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.url = ""
        self.connections = 0
        self.closed = anyio.Event()
        """A client has closed a connection."""

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[HttpClient]:
        server = await asyncio.start_server(self._talk, "127.0.0.1", 0, backlog=2_048)
        async with server:
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            async with HttpClient.open(self.url) as client:
                with anyio.fail_after(20):
                    yield client

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
                if not await self.answer(await reader.readexactly(length), writer):
                    break
        except (asyncio.IncompleteReadError, ConnectionResetError):
            self.closed.set()
        finally:
            writer.close()


async def echo(body: bytes, writer: asyncio.StreamWriter) -> bool:
    writer.write(OK + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    return True


def chunked(pieces: list[bytes]) -> bytes:
    chunks = b"".join(b"%x;note=1\r\n%b\r\n" % (len(piece), piece) for piece in pieces if piece)
    return OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\nTrailer: x\r\n\r\n"


@given(pieces=st.lists(st.binary(max_size=40)), cuts=st.lists(st.integers(0, 200)), plain=st.booleans())
def test_a_reply_is_the_same_however_its_bytes_arrive(pieces: list[bytes], cuts: list[int], plain: bool) -> None:
    body = b"".join(pieces)
    whole = OK + b"content-LENGTH:%d\r\n\r\n" % len(body) + body if plain else chunked(pieces)
    whole = b"HTTP/1.1 100 Continue\r\n\r\n" + whole
    edges = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    reply, seen = Reply(), b""
    for first, end in pairwise(edges):
        assert not reply.finished or first == len(whole)
        if first < end:
            reply.feed(whole[first:end])
        seen += reply.take()
    assert (reply.status, reply.finished, reply.reusable, seen) == (200, True, True, body)


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        OK + b"Content-Length: -1\r\n\r\n",
        OK + b"Content-Length: 2\r\n\r\nabc",
        OK + b"Transfer-Encoding: chunked\r\n\r\n-5\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nmore",
        OK + b"X: " + b"y" * 70_000,
    ],
)
def test_what_is_no_reply_is_refused(data: bytes) -> None:
    with pytest.raises(BadReply):
        Reply().feed(data)


async def test_requests_one_after_the_other_share_a_connection_and_at_once_have_their_own() -> None:
    server = Server(echo)
    async with server.serve() as client:
        for number in range(5):
            assert await client.fetch("POST", "/x", b"%d" % number) == b"%d" % number
        assert server.connections == 1
        replies: dict[int, bytes] = {}

        async def ask(number: int) -> None:
            replies[number] = await client.fetch("POST", "/x", b"%d" % number)

        async with anyio.create_task_group() as tasks:
            for number in range(500):
                tasks.start_soon(ask, number)
        assert replies == {number: b"%d" % number for number in range(500)}
        connections = server.connections
        assert await client.fetch("GET", "/x") == b""
        assert server.connections == connections


async def test_a_cancelled_request_takes_its_connection_with_it() -> None:
    arrived, release = anyio.Event(), anyio.Event()

    async def answer(body: bytes, writer: asyncio.StreamWriter) -> bool:
        if body == b"slow":
            arrived.set()
            await release.wait()
        return await echo(body, writer)

    server = Server(answer)
    async with server.serve() as client:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.fetch, "POST", "/x", b"slow")
            await arrived.wait()
            tasks.cancel_scope.cancel()
        release.set()
        assert await client.fetch("POST", "/x", b"quick") == b"quick"
        assert server.connections == 2
        await server.closed.wait()


async def test_a_connection_the_server_closed_while_idle_is_not_used_again() -> None:
    async def answer(body: bytes, writer: asyncio.StreamWriter) -> bool:
        await echo(body, writer)
        return body != b"last"

    server = Server(answer)
    async with server.serve() as client:
        assert await client.fetch("POST", "/x", b"last") == b"last"
        while client.idle:
            await anyio.lowlevel.checkpoint()
        assert await client.fetch("POST", "/x", b"next") == b"next"
        assert server.connections == 2


async def test_a_connection_idle_for_too_long_is_given_up_with_all_older_ones() -> None:
    now = [100.0]
    server = Server(echo)
    async with server.serve() as client:
        client.clock = lambda: now[0]
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(client.fetch, "POST", "/x", b"")
        assert client.idle == server.connections == 3
        now[0] += 2.9
        await client.fetch("POST", "/x", b"")
        assert server.connections == 3
        now[0] += 3.1
        await client.fetch("POST", "/x", b"")
        assert (server.connections, client.idle) == (4, 1)


@pytest.mark.parametrize("sent", [b"", OK[:5], OK + b"Content-Length: 9\r\n\r\nhalf", chunked([b"abc"])[:-9]])
async def test_a_reply_that_breaks_off_is_an_error(sent: bytes) -> None:
    async def answer(_body: bytes, writer: asyncio.StreamWriter) -> bool:
        writer.write(sent)
        return False

    async with Server(answer).serve() as client:
        with pytest.raises(Broken, match="closed the connection"):
            await client.fetch("POST", "/x", b"")
        assert client.idle == 0


async def test_a_reply_without_length_ends_with_its_connection() -> None:
    async def answer(_body: bytes, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.0 200 OK\r\n\r\nall of it")
        return False

    async with Server(answer).serve() as client:
        assert await client.fetch("POST", "/x", b"") == b"all of it"
        assert client.idle == 0


async def test_a_refusal_comes_with_the_servers_words_streamed_or_not() -> None:
    async def answer(_body: bytes, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 3\r\n\r\nbad")
        return True

    server = Server(answer)
    async with server.serve() as client:
        with pytest.raises(Refused) as whole:
            await client.fetch("POST", "/x", b"")
        with pytest.raises(Refused) as streamed:
            async for _ in client.stream("/x", b""):
                pass
        assert [(e.value.status, e.value.content) for e in (whole, streamed)] == [(400, b"bad")] * 2
        assert server.connections == 1


async def test_a_stream_hands_over_pieces_as_they_come_and_may_be_left() -> None:
    go_on = anyio.Event()

    async def answer(_body: bytes, writer: asyncio.StreamWriter) -> bool:
        writer.write(OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\none\r\n")
        await go_on.wait()
        writer.write(b"3\r\ntwo\r\n0\r\n\r\n")
        return True

    server = Server(answer)
    async with server.serve() as client:
        pieces: list[bytes] = []
        async for piece in client.stream("/x", b""):
            pieces.append(piece)
            go_on.set()
        assert b"".join(pieces) == b"onetwo" and pieces[0] == b"one" and client.idle == 1
        go_on = anyio.Event()
        async with aclosing(client.stream("/x", b"")) as parts:
            assert await anext(parts) == b"one"
        assert client.idle == 0
        go_on.set()
        await server.closed.wait()


async def test_nobody_listening_is_a_broken_connection() -> None:
    async with Server(echo).serve() as client:
        client.url = "http://127.0.0.1:1/prefix/"
        assert client.url == "http://127.0.0.1:1/prefix"
        with pytest.raises(Broken, match="onnect"):
            await client.fetch("GET", "/health")


ROWS = st.lists(st.tuples(st.floats(-50, 0, width=32), st.integers(0, 200_000)), max_size=30)


@given(rows=ROWS, texts=st.booleans(), last=st.booleans(), words=st.text())
def test_rows_are_read_alike_with_and_without_texts(
    rows: list[tuple[float, int]], texts: bool, last: bool, words: str
) -> None:
    written = [[logprob, token, '"]],[[null' if texts and token % 2 else None] for logprob, token in rows]
    meta = {"completion_tokens": len(rows), "note": [[1], ["n"]], "output_token_logprobs": written}
    more = (
        {} if last else {"cached_tokens": 7, "matrix": [[1, 2], [3, 4]], "words": f'"output_token_logprobs":[[{words}'}
    )
    reply = {"text": f'"output_token_logprobs":[[{words}', "output_ids": [r[1] for r in rows], "meta_info": meta | more}
    parsed = parse_answer(orjson.dumps(reply), filtered=False)
    assert parsed.tokens.tolist() == [token for _, token in rows]
    assert parsed.logprobs.tolist() == [logprob for logprob, _ in rows]
    assert parsed.cached == (0 if last else 7)


@pytest.mark.parametrize("rows", [[[None, 5, None]], [[-0.5, 6, None]], [], [[-0.5, 5, None], [-0.5, 5, None]]])
def test_rows_that_do_not_fit_the_tokens_are_refused(rows: list[list[float | None]]) -> None:
    reply = {"output_ids": [5], "meta_info": {"completion_tokens": 1, "output_token_logprobs": rows}}
    with pytest.raises(BadAnswer, match="log-probabilit"):
        parse_answer(orjson.dumps(reply), filtered=False)
