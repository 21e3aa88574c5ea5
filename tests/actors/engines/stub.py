"""A small server that speaks SGLang's interface and does what a test tells it to."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
import anyio
from aiohttp import web

from actors.engines.sglang.launch import free_port

Body = Mapping[str, object]
PATHS = (
    "/generate",
    "/abort_request",
    "/pause_generation",
    "/continue_generation",
    "/begin_weight_update",
    "/weights_checker",
)


@dataclass
class Stub:
    """Answers every request with the tokens 1, 2, 3, … of probability 1/2, up to its limit."""

    url: str = ""
    requests: list[tuple[str, Body]] = field(default_factory=list)
    """(path, body) of everything asked, but for health."""
    checksums: Mapping[str, str] = field(default_factory=dict)
    version: str = "default"
    paths: Sequence[str] = PATHS
    break_after: int | None = None
    """The next streamed reply breaks off after so many tokens."""
    always_break: bool = False
    """Every request loses its connection."""
    hold_after: int | None = None
    """Streamed replies wait after so many tokens until `go_on`."""
    hang: bool = False
    """Replies never come."""
    refuses_weights: bool = False
    refuses: Sequence[str] = ()
    """Paths that are answered with no."""
    hang_updates: bool = False
    """Updates never end."""
    silent: Collection[str] = ()
    """Questions about itself that get no answer."""
    looks: int = 0
    """How often it was asked which model it serves."""
    stays_paused: bool = False
    """Does not go on after a swap."""
    go_on: anyio.Event = field(default_factory=anyio.Event)
    arrived: anyio.Event = field(default_factory=anyio.Event)
    """A request for tokens is here."""

    def asked(self, path: str) -> list[Body]:
        return [body for where, body in self.requests if where == path]

    @asynccontextmanager
    async def serve(self, port: int = 0) -> AsyncIterator[None]:
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/openapi.json", self._interface)
        app.router.add_get("/model_info", self._model_info)
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/{path}", self._other)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        port = port or free_port()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        self.url = f"http://127.0.0.1:{port}"
        try:
            yield
        finally:
            await runner.cleanup()

    async def _health(self, _request: web.Request) -> web.Response:
        if "/health" in self.silent:
            await anyio.sleep_forever()
        return web.Response()

    async def _interface(self, _request: web.Request) -> web.Response:
        return web.json_response({"paths": {path: {} for path in self.paths}})

    async def _model_info(self, _request: web.Request) -> web.Response:
        self.looks += 1
        if "/model_info" in self.silent:
            await anyio.sleep_forever()
        return web.json_response({"model_path": "model", "weight_version": self.version})

    async def _other(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append((request.path, body))
        if request.path in self.refuses:
            return web.json_response({"success": False, "message": "no"}, status=400)
        if request.path == "/update_weights_from_disk":
            if self.hang_updates:
                await anyio.sleep_forever()
            if self.refuses_weights:
                return web.json_response({"success": False, "message": "no room"}, status=400)
            self.version = body["weight_version"]
        if self.stays_paused and request.path == "/continue_generation":
            return web.json_response({"message": "stuck"}, status=500)
        return web.json_response({"success": True, "message": "", "ranks": [{"checksums": dict(self.checksums)}]})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append((request.path, body))
        self.arrived.set()
        if self.hang:
            await anyio.sleep_forever()
        if self.always_break:
            assert request.transport is not None
            request.transport.abort()
        count = body["sampling_params"]["max_new_tokens"]
        if not body["stream"]:
            return web.json_response(answer(1, count, self.version, finished=True))
        response = web.StreamResponse()
        await response.prepare(request)
        for token in range(1, count + 1):
            if self.break_after is not None and token > self.break_after:
                self.break_after = None
                assert request.transport is not None
                request.transport.abort()
                return response
            if self.hold_after is not None and token > self.hold_after:
                await self.go_on.wait()
            event = answer(token, token, self.version, finished=token == count)
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response


@dataclass
class StubRouter:
    """Sends requests for tokens to its workers in turn; like the real ones it knows nothing of weights."""

    workers: list[str]
    url: str = ""
    routing_keys: list[str] = field(default_factory=list)

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[None]:
        app = web.Application()
        app.router.add_get("/workers", self._list)
        app.router.add_post("/generate", self._generate)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        port = free_port()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        self.url = f"http://127.0.0.1:{port}"
        try:
            async with aiohttp.ClientSession() as self._session:
                yield
        finally:
            await runner.cleanup()

    async def _list(self, _request: web.Request) -> web.Response:
        return web.json_response({"workers": [{"id": url, "url": url, "is_healthy": True} for url in self.workers]})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        self.routing_keys.append(request.headers["X-SMG-Routing-Key"])
        worker = self.workers[len(self.routing_keys) % len(self.workers)]
        async with self._session.post(worker + "/generate", data=await request.read()) as reply:
            response = web.StreamResponse(status=reply.status)
            await response.prepare(request)
            async for part in reply.content.iter_any():
                await response.write(part)
            return response


def answer(first: int, last: int, version: str, *, finished: bool) -> dict[str, object]:
    """A reply, or an event of one, with the tokens first … last."""
    tokens = list(range(first, last + 1))
    meta: dict[str, object] = {
        "finish_reason": {"type": "length", "length": last} if finished else None,
        "completion_tokens": last,
        "weight_version": version,
        "output_token_logprobs": [[-0.6931472, token, None] for token in tokens],
    }
    if finished:
        meta["weight_versions"] = [{"version": version, "start": 0, "end": last}]
    return {"output_ids": tokens, "meta_info": meta}


async def main() -> None:
    """A stub in a process of its own: prints its URL and serves until killed."""
    stub = Stub(hold_after=int(sys.argv[1]), checksums=json.loads(sys.argv[2]))
    async with stub.serve():
        sys.stdout.write(f"{stub.url}\n")
        sys.stdout.flush()
        await anyio.sleep_forever()


if __name__ == "__main__":
    anyio.run(main)
