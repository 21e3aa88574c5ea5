"""Language models elsewhere, behind OpenAI's chat completions: judges, and roles that are not ours to train."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, Self

import anyio
import httpx2
import orjson
import structlog
from pydantic import BaseModel, ValidationError

from actors.flights import Flights
from actors.render import Message
from actors.tools.cache import CallCache
from matpo.config import Config, Endpoint, Sampling
from matpo.rewards.judge import ChatFailed

log: structlog.stdlib.BoundLogger = structlog.get_logger()

WORTH_ANOTHER_TRY: Final = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
LONGEST_PAUSE_S: Final = 60.0
REMEMBERED_REPLIES: Final = 100_000
JUDGE_TOKENS: Final = 16
"""Room for a letter and a few words around it."""


class _Said(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Said


class _Completion(BaseModel):
    """The part of a reply we read."""

    choices: list[_Choice]


class ChatClient:
    """One such model. Safe to use from many episodes at once."""

    def __init__(self, endpoint: Endpoint, http: httpx2.AsyncClient, *, pause_s: float) -> None:
        self._endpoint = endpoint
        self._http = http
        self._pause_s = pause_s
        self._room = anyio.CapacityLimiter(endpoint.max_inflight)

    @classmethod
    @asynccontextmanager
    async def open(cls, endpoint: Endpoint, *, pause_s: float = 1.0) -> AsyncIterator[Self]:
        """`pause_s`: before the second try; doubled before each further one. Raises `UserError` for a missing key."""
        key = endpoint.api_key()
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        limits = httpx2.Limits(max_connections=endpoint.max_inflight)
        async with httpx2.AsyncClient(headers=headers, limits=limits, timeout=None) as http:
            yield cls(endpoint, http, pause_s=pause_s)

    async def complete(self, messages: Sequence[Message], sampling: Sampling) -> str:
        """What the model says next. Raises `ChatFailed` after the last try, or at once where another cannot help."""
        body = orjson.dumps(
            {
                "model": self._endpoint.model,
                "messages": [{"role": message.role, "content": message.content} for message in messages],
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_tokens": sampling.max_tokens,
            }
        )
        async with self._room:
            reply = await self._try_for_long(body)
        if isinstance(reply, _Trouble):
            log.warning("a model elsewhere gave no answer", url=self._endpoint.url, reason=reply.reason)
            raise ChatFailed(f"{self._endpoint.url} ({self._endpoint.model}): {reply.reason}")
        return reply

    async def _try_for_long(self, body: bytes) -> str | _Trouble:
        """The reply, or the trouble of the last try."""
        pause_s = self._pause_s
        for _ in range(self._endpoint.tries - 1):
            reply = await self._try(body)
            if isinstance(reply, str) or not reply.passing:
                return reply
            await anyio.sleep(min(LONGEST_PAUSE_S, max(pause_s, reply.wait_s)))
            pause_s *= 2
        return await self._try(body)

    async def _try(self, body: bytes) -> str | _Trouble:
        url, timeout_s = f"{self._endpoint.url}/chat/completions", self._endpoint.timeout_s
        try:
            with anyio.fail_after(timeout_s):
                reply = await self._http.post(url, content=body, headers={"Content-Type": "application/json"})
        except TimeoutError:
            return _Trouble(f"no answer in {timeout_s:g} s", passing=True)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            return _Trouble(str(error) or type(error).__name__, passing=isinstance(error, httpx2.TransportError))
        if reply.status_code != 200:
            reason = f"HTTP {reply.status_code}: {reply.text[:200]}"
            passing = reply.status_code in WORTH_ANOTHER_TRY
            return _Trouble(reason, passing=passing, wait_s=_seconds(reply.headers.get("retry-after")))
        try:
            said = _Completion.model_validate_json(reply.content).choices[0].message.content
        except (ValidationError, IndexError):
            return _Trouble("the reply is not a chat completion", passing=False)
        return said or ""


@dataclass(frozen=True, slots=True)
class _Trouble:
    """Why a try came to nothing."""

    reason: str
    passing: bool
    """It may be over at the next try."""
    wait_s: float = 0.0
    """What the server asks for."""


class JudgeClient:
    """A judge's model: asks every prompt once, whoever asks it, and remembers what it said."""

    def __init__(self, chat: ChatClient, *, name: str, file: CallCache | None) -> None:
        self._chat = chat
        self._name = name
        self._file = file
        self._memory: OrderedDict[bytes, str] = OrderedDict()
        self._flights = Flights[str]()

    async def ask(self, prompt: str, *, again: int = 0) -> str:
        """See `matpo.rewards.judge.Chat`. Failures are not remembered."""
        facts = (self._name, prompt, str(again))
        key = hashlib.sha256(orjson.dumps(facts)).digest()
        return await self._flights.once(key, lambda: self._known_or_asked(key, prompt, again))

    async def _known_or_asked(self, key: bytes, prompt: str, again: int) -> str:
        if (known := self._memory.get(key)) is not None:
            return known
        reply = None if self._file is None else self._file.find(key)
        if reply is None:
            sampling = Sampling(temperature=0.0 if again == 0 else 1.0, max_tokens=JUDGE_TOKENS)
            began = anyio.current_time()
            reply = await self._chat.complete([Message("user", prompt)], sampling)
            if self._file is not None:
                self._file.keep(key, ("judge", self._name, "", "", prompt), reply, anyio.current_time() - began)
        self._memory[key] = reply
        if len(self._memory) > REMEMBERED_REPLIES:
            self._memory.popitem(last=False)
        return reply


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """The models elsewhere that a config names."""

    judge: JudgeClient | None = None
    roles: Mapping[str, ChatClient] = field(default_factory=dict)


NOBODY = Elsewhere()


@asynccontextmanager
async def open_elsewhere(config: Config) -> AsyncIterator[Elsewhere]:
    """Clients for the judge and for the roles with an endpoint. Raises `UserError` for a key that is not set."""
    async with AsyncExitStack() as stack:
        roles = {
            name: await stack.enter_async_context(ChatClient.open(role.endpoint))
            for name, role in config.episode.roles.items()
            if role.endpoint is not None
        }
        settings, judge = config.rewards.judge, None
        if settings is not None:
            path, option = settings.cache_file, "rewards.judge.cache_file"
            file = None if path is None else stack.enter_context(CallCache.open(path, option=option))
            chat = await stack.enter_async_context(ChatClient.open(settings))
            judge = JudgeClient(chat, name=settings.model, file=file)
        yield Elsewhere(judge, roles)


def _seconds(header: str | None) -> float:
    """A `Retry-After` in seconds; 0 for a date or nonsense."""
    try:
        seconds = float(header or 0)
    except ValueError:
        return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0
