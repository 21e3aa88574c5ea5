"""The part of SGLang's HTTP interface an engine needs. Knows nothing of episodes or versions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final, Literal, Self, TypeVar

import anyio
import numpy as np
import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from actors.engines.sglang.http import Broken, HttpClient, Method, Refused
from matpo.config import Sampling
from protocols.records import Tokens

Swap = Literal["retract", "in_place", "abort"]
T = TypeVar("T", bound=BaseModel)
EVENT: Final = b"data: "
END_OF_STREAM: Final = b"[DONE]"
LARGEST_EVENT_BYTES: Final = 16 * 2**20
ABORT_TIMEOUT_S: Final = 2.0
MOST_SUPPORT_TOKENS: Final = 4096
"""A server reports log-probabilities over the support of top-k and top-p only if it has no more tokens than that."""
ROUTING_KEY: Final = "X-SMG-Routing-Key"
"""Honoured by smg and sglang-router, with their policies `consistent_hashing` and `manual` or `--sticky-sessions`."""


class ServerGone(Exception):
    """No connection, or it broke: the server is dead, restarting or unreachable."""


class ServerRefused(Exception):
    """The server answered, and the answer is no."""


class _Success(BaseModel):
    model_config = ConfigDict(extra="ignore")

    success: bool = True
    message: str = ""
    error_message: str = ""


class _Place(BaseModel):
    model_config = ConfigDict(extra="ignore")

    tp_rank: int = 0
    tp_size: int = 1


class RankChecksums(BaseModel):
    """What a rank of a server holds."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    checksums: dict[str, str]
    """By tensor name."""
    parallelism_info: tuple[_Place, ...] = (_Place(),)

    @property
    def rank(self) -> int:
        """Its place among the ranks that share tensors."""
        return self.parallelism_info[0].tp_rank

    @property
    def ranks(self) -> int:
        """How many share tensors."""
        return self.parallelism_info[0].tp_size


class _Named(BaseModel):
    model_config = ConfigDict(extra="ignore")

    id: str


class _Models(BaseModel):
    model_config = ConfigDict(extra="ignore")

    data: list[_Named]


class _Checksums(BaseModel):
    model_config = ConfigDict(extra="ignore")

    success: bool
    message: str = ""
    ranks: list[RankChecksums] | None = None


class _Load(BaseModel):
    model_config = ConfigDict(extra="ignore")

    num_running_reqs: int
    num_waiting_reqs: int


class _Loads(BaseModel):
    model_config = ConfigDict(extra="ignore")

    loads: list[_Load]


class _Interface(BaseModel):
    model_config = ConfigDict(extra="ignore")

    paths: dict[str, object]


class _Worker(BaseModel):
    model_config = ConfigDict(extra="ignore")

    url: str


class _Workers(BaseModel):
    model_config = ConfigDict(extra="ignore")

    workers: list[_Worker]


class ModelInfo(BaseModel):
    """What the server says of the model it serves."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model_path: str
    weight_version: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One request for a continuation."""

    rid: str
    """Every id has the same length: the server aborts whatever *begins* with the id it is given."""
    tokens: Tokens
    sampling: Sampling
    max_tokens: int
    ends: tuple[int, ...]
    cache_key: str
    """Keys and values are shared only between requests with the same key."""
    stream_tokens: int
    adapter: str = ""
    """Name of the adapter to sample with; empty: the server's weights alone."""
    routing_key: str = ""
    """A router sends requests of one key to one server; plain letters and digits. Empty: as it likes."""

    @property
    def filtered(self) -> bool:
        """Whether tokens are drawn from a part of the vocabulary only."""
        return self.sampling.temperature > 0 and (self.sampling.top_p < 1 or self.sampling.top_k > 0)

    def body(self) -> bytes:
        """As JSON. Every sampling option is given: the server would fill gaps from the model's generation_config."""
        sampling, greedy = self.sampling, self.sampling.temperature == 0
        parameters = {
            "temperature": sampling.temperature,
            "top_p": 1.0 if greedy else sampling.top_p,
            "top_k": min(sampling.top_k or MOST_SUPPORT_TOKENS, MOST_SUPPORT_TOKENS) if self.filtered else -1,
            "min_p": 0.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
            "min_new_tokens": 0,
            "max_new_tokens": self.max_tokens,
            "stop_token_ids": self.ends,
            "ignore_eos": False,
            "n": 1,
        }
        if self.stream_tokens:
            parameters["stream_interval"] = self.stream_tokens
        content = {
            "rid": self.rid,
            "input_ids": np.ascontiguousarray(self.tokens),
            "sampling_params": parameters,
            "return_logprob": True,
            "return_sampling_mask": self.filtered,
            "extra_key": self.cache_key,
            "stream": self.stream_tokens > 0,
        }
        if self.adapter:
            content["lora_path"] = self.adapter
        return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


class SglangClient:
    """One server. Every method raises `ServerGone` or `ServerRefused`; deadlines of `generate` are the caller's."""

    def __init__(self, http: HttpClient) -> None:
        self._http = http

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str) -> AsyncIterator[Self]:
        """A pool of as many connections as there are requests."""
        async with HttpClient.open(url) as http:
            yield cls(http)

    @property
    def url(self) -> str:
        """Of the server; may be set when another takes its place."""
        return self._http.url

    @url.setter
    def url(self, url: str) -> None:
        self._http.url = url

    async def answer(self, request: Request) -> bytes:
        """The JSON of the reply to a request that is not streamed."""
        try:
            return await self._http.fetch("POST", "/generate", request.body(), _routing(request))
        except (Refused, Broken) as error:
            raise self._trouble(error) from error

    async def stream(self, request: Request) -> AsyncGenerator[bytes, None]:
        """The JSON of each event of the reply to a streamed request."""
        try:
            async with aclosing(self._http.stream("/generate", request.body(), _routing(request))) as parts:
                async for event in _events(parts):
                    yield event
        except (Refused, Broken) as error:
            raise self._trouble(error) from error

    async def abort(self, rid: str) -> None:
        """End a request, if the server still has it. Failures do not matter: then it is gone or ends by itself."""
        with anyio.CancelScope(shield=True), suppress(ServerGone, ServerRefused):
            await self._post("/abort_request", {"rid": rid}, deadline_s=ABORT_TIMEOUT_S)

    async def pause(self, mode: Swap, *, deadline_s: float) -> None:
        """Stop sampling; what becomes of running requests is the mode's. New requests wait."""
        await self._post("/pause_generation", {"mode": mode}, deadline_s=deadline_s)

    async def resume(self, *, deadline_s: float) -> None:
        """Go on sampling. May be called twice."""
        await self._post("/continue_generation", {"torch_empty_cache": False}, deadline_s=deadline_s)

    async def update_from_disk(self, folder: str, *, version: int, flush: bool, deadline_s: float) -> None:
        """Load the weights of a Hugging Face folder."""
        body = {
            "model_path": folder,
            "weight_version": str(version),
            "flush_cache": flush,
            "abort_all_requests": False,
            "torch_empty_cache": False,
        }
        await self.command("/update_weights_from_disk", body, deadline_s=deadline_s)

    async def command(self, path: str, body: Mapping[str, object], *, deadline_s: float) -> None:
        """POST `body`. Raises `ServerRefused` also where the server reports failure."""
        reply = _parse(_Success, await self._post(path, body, deadline_s=deadline_s))
        if not reply.success:
            raise ServerRefused(reply.message or reply.error_message)

    async def checksums(self, *, deadline_s: float) -> list[RankChecksums]:
        """Of every rank."""
        content = await self._post("/weights_checker", {"action": "checksum"}, deadline_s=deadline_s)
        reply = _parse(_Checksums, content)
        if not reply.success or not reply.ranks:
            raise ServerRefused(f"no checksums: {reply.message}")
        return reply.ranks

    async def models(self, *, deadline_s: float) -> frozenset[str]:
        """Names of the model and of the adapters the server has."""
        content = await self._call("GET", "/v1/models", deadline_s=deadline_s)
        return frozenset(model.id for model in _parse(_Models, content).data)

    async def model_info(self, *, deadline_s: float) -> ModelInfo:
        """Which model is served."""
        return _parse(ModelInfo, await self._call("GET", "/model_info", deadline_s=deadline_s))

    async def paths(self, *, deadline_s: float) -> frozenset[str]:
        """What may be called."""
        content = await self._call("GET", "/openapi.json", deadline_s=deadline_s)
        return frozenset(_parse(_Interface, content).paths)

    async def workers(self, *, deadline_s: float) -> frozenset[str]:
        """URLs of the servers behind a router."""
        content = await self._call("GET", "/workers", deadline_s=deadline_s)
        return frozenset(worker.url.rstrip("/") for worker in _parse(_Workers, content).workers)

    async def loads(self, *, deadline_s: float) -> tuple[int, int]:
        """(running, waiting) requests, as the scheduler reports them."""
        loads = _parse(_Loads, await self._call("GET", "/v1/loads", deadline_s=deadline_s)).loads
        return sum(load.num_running_reqs for load in loads), sum(load.num_waiting_reqs for load in loads)

    async def healthy(self, *, deadline_s: float) -> bool:
        """Whether the server answers and calls itself healthy."""
        return await self._answers("/health", deadline_s=deadline_s)

    async def present(self, *, deadline_s: float) -> bool:
        """Whether the process that takes requests answers, whatever the scheduler behind it is busy with."""
        return await self._answers("/model_info", deadline_s=deadline_s)

    async def _answers(self, path: str, *, deadline_s: float) -> bool:
        try:
            await self._call("GET", path, deadline_s=deadline_s)
        except (ServerGone, ServerRefused):
            return False
        return True

    async def _post(self, path: str, body: object, *, deadline_s: float) -> bytes:
        return await self._call("POST", path, orjson.dumps(body), deadline_s=deadline_s)

    async def _call(self, method: Method, path: str, body: bytes = b"", *, deadline_s: float) -> bytes:
        try:
            with anyio.fail_after(deadline_s):
                return await self._http.fetch(method, path, body)
        except TimeoutError:
            raise ServerGone(f"{self.url}{path} did not answer within {deadline_s:g} s") from None
        except (Refused, Broken) as error:
            raise self._trouble(error, path) from error

    def _trouble(self, error: Refused | Broken, path: str = "") -> ServerGone | ServerRefused:
        """What to raise: an answer of the 500s is not about the request; the server is in no state for any."""
        if isinstance(error, Broken):
            return ServerGone(f"{self.url}{path}: {error}")
        text = _explain(error.content, error.status)
        return ServerGone(text) if error.status >= 500 else ServerRefused(text)


async def _events(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The payloads of server-sent events, up to [DONE]."""
    kept = bytearray()
    async for part in parts:
        kept += part
        while (end := kept.find(b"\n\n")) >= 0:
            event = bytes(kept[:end])
            del kept[: end + 2]
            if event.startswith(EVENT):
                payload = event[len(EVENT) :]
                if payload == END_OF_STREAM:
                    return
                yield payload
        if len(kept) > LARGEST_EVENT_BYTES:
            raise ServerRefused(f"an event of the stream has more than {LARGEST_EVENT_BYTES} bytes")
    raise ServerGone("the stream broke off")


def _parse(kind: type[T], content: bytes) -> T:
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        shown = content[:200].decode("utf-8", "replace")
        raise ServerRefused(f"reply cannot be read as {kind.__name__.strip('_')}: {shown}") from error


class _Problem(BaseModel):
    model_config = ConfigDict(extra="ignore")

    message: str


class _Problems(BaseModel):
    model_config = ConfigDict(extra="ignore")

    error: _Problem | None = None
    message: str | None = None
    error_message: str | None = None


def _routing(request: Request) -> str:
    """The header a router reads."""
    return f"{ROUTING_KEY}: {request.routing_key}\r\n" if request.routing_key else ""


def _explain(content: bytes, status: int) -> str:
    """The server's own words for a refusal."""
    try:
        problem = _Problems.model_validate_json(content)
    except ValidationError:
        return f"HTTP {status}: {content[:200].decode('utf-8', 'replace')}"
    text = problem.error.message if problem.error else problem.message or problem.error_message
    return f"HTTP {status}: {text or content[:200].decode('utf-8', 'replace')}"
