"""Web search by Serper, Brave, Tavily or a SearXNG of one's own, behind the same `search` tool as a local index.

Keys come from the environment only and appear in no message, log or URL.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import anyio
import httpx2
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from tool_servers.blocklist import Blocklist
from tool_servers.serving import Unavailable

Name = Literal["serper", "brave", "tavily", "searxng"]
PROVIDERS: tuple[Name, ...] = ("serper", "brave", "tavily", "searxng")
MOST_BYTES = 5 * 2**20
BRAVE_MOST_RESULTS = TAVILY_MOST_RESULTS = 20
BRAVE_MOST_CHARACTERS, BRAVE_MOST_WORDS = 400, 50


class ProviderError(Exception):
    """A provider cannot be used as configured; says what to set."""


class Hit(BaseModel):
    """One result of any provider."""

    model_config = ConfigDict(frozen=True)

    title: str
    url: str
    text: str


class _Serper(BaseModel):
    class Result(BaseModel):
        title: str = ""
        link: str
        snippet: str = ""

    organic: list[Result] = []

    def hits(self) -> list[Hit]:
        return [Hit(title=r.title, url=r.link, text=r.snippet) for r in self.organic]


class _Brave(BaseModel):
    class Result(BaseModel):
        title: str = ""
        url: str
        description: str | None = None

    class Web(BaseModel):
        results: list[_Brave.Result] = []

    web: Web | None = None
    """Absent when nothing was found."""

    def hits(self) -> list[Hit]:
        found = [] if self.web is None else self.web.results
        return [Hit(title=r.title, url=r.url, text=r.description or "") for r in found]


class _Content(BaseModel):
    """Tavily's answer and SearXNG's."""

    class Result(BaseModel):
        title: str | None = None
        url: str
        content: str | None = None

    results: list[Result] = []

    def hits(self) -> list[Hit]:
        return [Hit(title=r.title or "", url=r.url, text=r.content or "") for r in self.results]


class _Answer(Protocol):
    """An answer of a provider, checked."""

    def hits(self) -> list[Hit]: ...


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to a provider."""

    method: Literal["GET", "POST"]
    url: str
    headers: Mapping[str, str]
    parameters: Mapping[str, str] | None = None
    """Of the query string."""
    body: Mapping[str, JsonValue] | None = None
    """JSON."""


_KEYS: dict[Name, str] = {"serper": "SERPER_API_KEY", "brave": "BRAVE_API_KEY", "tavily": "TAVILY_API_KEY"}
_ADDRESSES: dict[Name, str] = {
    "serper": "https://google.serper.dev",
    "brave": "https://api.search.brave.com",
    "tavily": "https://api.tavily.com",
}
_FORMS: dict[Name, type[_Serper] | type[_Brave] | type[_Content]] = {
    "serper": _Serper,
    "brave": _Brave,
    "tavily": _Content,
    "searxng": _Content,
}


class Provider:
    """Asks one provider."""

    def __init__(self, name: Name, *, address: str | None, timeout_s: float, blocklist: Blocklist) -> None:
        """`address` replaces the provider's own (and is needed for SearXNG). Raises `ProviderError`."""
        variable = _KEYS.get(name)
        key = "" if variable is None else os.environ.get(variable, "").strip()
        if variable is not None and not key:
            raise ProviderError(f"--provider {name} needs the environment variable {variable}")
        if name not in _ADDRESSES and address is None:
            raise ProviderError(f"--provider {name} needs --provider-url, the address of your instance")
        self.name: Name = name
        self._variable = variable
        self._key = key
        self._address = (address or _ADDRESSES[name]).rstrip("/")
        self._timeout_s = timeout_s
        self._blocklist = blocklist
        self._client: httpx2.AsyncClient | None = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Keep connections for the length of the block."""
        async with httpx2.AsyncClient(timeout=self._timeout_s) as self._client:
            yield

    async def search(self, query: str, k: int) -> list[Hit]:
        """The best `k` results that the blocklist lets through. Raises `Unavailable`."""
        ask = self._ask(query, k)
        try:
            with anyio.fail_after(self._timeout_s):
                body = await self._fetch(ask)
        except TimeoutError:
            raise Unavailable(f"{self.name} did not answer within {self._timeout_s:g} s") from None
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            raise Unavailable(f"{self.name} cannot be reached ({type(error).__name__})") from None
        try:
            answer: _Answer = _FORMS[self.name].model_validate_json(body)
        except ValidationError as error:
            where = ".".join(str(part) for part in error.errors()[0]["loc"]) or "the start"
            raise Unavailable(f"{self.name} answered in a form that is not its own (at {where})") from None
        return [hit for hit in answer.hits() if self._blocklist.covers(hit.url) is None][:k]

    def _ask(self, query: str, k: int) -> Ask:
        match self.name:
            case "serper":
                headers = {"X-API-KEY": self._key}
                return Ask("POST", f"{self._address}/search", headers, body={"q": query, "num": k})
            case "brave":
                short = " ".join(query[:BRAVE_MOST_CHARACTERS].split()[:BRAVE_MOST_WORDS])
                asked = {"q": short, "count": str(min(k, BRAVE_MOST_RESULTS)), "text_decorations": "false"}
                headers = {"X-Subscription-Token": self._key, "Accept": "application/json"}
                return Ask("GET", f"{self._address}/res/v1/web/search", headers, parameters=asked)
            case "tavily":
                headers = {"Authorization": f"Bearer {self._key}"}
                most = min(k, TAVILY_MOST_RESULTS)
                return Ask("POST", f"{self._address}/search", headers, body={"query": query, "max_results": most})
            case "searxng":
                return Ask("GET", f"{self._address}/search", {}, parameters={"q": query, "format": "json"})

    async def _fetch(self, ask: Ask) -> bytes:
        assert self._client is not None, "a provider is asked while it is open"
        request = self._client.stream(ask.method, ask.url, headers=ask.headers, params=ask.parameters, json=ask.body)
        async with request as response:
            if response.status_code != 200:
                raise Unavailable(self._refusal(response.status_code))
            body = bytearray()
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > MOST_BYTES:
                    raise Unavailable(f"{self.name} answered with more than {MOST_BYTES:,} bytes")
            return bytes(body)

    def _refusal(self, status: int) -> str:
        match status:
            case 401 | 403 if self._variable is not None:
                return f"{self.name} refused the key in {self._variable} (status {status})"
            case 403:
                return f"{self.name} refused (status 403); allow the format `json` in its settings.yml (search.formats)"
            case 429:
                return f"{self.name} is asked too often (status 429)"
            case _:
                return f"{self.name} answered with status {status}"
