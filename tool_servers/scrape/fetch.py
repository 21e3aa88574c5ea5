"""Fetch a web page without letting anyone point us at the inside of a network, or drown us."""

from __future__ import annotations

import asyncio
import socket
import ssl
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from urllib.parse import SplitResult, urljoin, urlsplit

import httpcore2

from tool_servers.blocklist import Blocklist
from tool_servers.scrape.addresses import Network, Refused, vet
from tool_servers.scrape.page import FetchFailed, NotThere, Page
from tool_servers.scrape.robots import Robots

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Host and port → addresses."""
USER_AGENT = "matpo-scrape/0.1 (+https://modelcontextprotocol.io)"
REDIRECTS = 5
_REDIRECT_CODES = frozenset({301, 302, 303, 307, 308})


@dataclass(frozen=True, slots=True)
class Policy:
    """What may be fetched, and how much of it."""

    max_bytes: int = 5 * 2**20
    """After decompression."""
    total_s: float = 20.0
    """From the first lookup to the last byte, redirects included."""
    ports: frozenset[int] = frozenset({80, 443})
    blocklist: Blocklist = field(default_factory=Blocklist)
    allowed_networks: tuple[Network, ...] = ()
    """Networks that are not public and may be fetched nevertheless."""
    robots: bool = False
    """Heed robots.txt."""


async def system_resolve(host: str, port: int) -> Sequence[str]:
    """The operating system's resolver (which also reads notations such as 127.1 and 0x7f000001)."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


class VettedBackend(httpcore2.AsyncNetworkBackend):
    """Resolves a name once, vets every address it has, and connects to one of exactly those."""

    def __init__(self, resolve: Resolve, allowed: Sequence[Network]) -> None:
        self._resolve = resolve
        self._allowed = allowed
        self._inner = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Connect to a vetted address of `host`. Raises `Refused` when any of its addresses is not public."""
        try:
            addresses = await self._resolve(host, port)
        except OSError as error:
            raise httpcore2.ConnectError(f"{host} cannot be resolved") from error
        if not addresses:
            raise httpcore2.ConnectError(f"{host} has no address")
        vetted = [vet(address.partition("%")[0], self._allowed) for address in addresses]
        return await self._inner.connect_tcp(str(vetted[0]), port, timeout, local_address, socket_options)

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None
    ) -> httpcore2.AsyncNetworkStream:
        """Never."""
        raise Refused(f"{path!r} is not a web address")

    async def sleep(self, seconds: float) -> None:
        """Between the pool's retries (there are none)."""
        await asyncio.sleep(seconds)


class Fetcher:
    """Fetches pages under one policy. No proxies, cookies or other settings come from the environment."""

    def __init__(self, policy: Policy, *, resolve: Resolve = system_resolve) -> None:
        self._policy = policy
        self._robots = Robots(Fetcher(replace(policy, robots=False), resolve=resolve).fetch) if policy.robots else None
        self._backend = VettedBackend(resolve, policy.allowed_networks)
        self._tls = ssl.create_default_context()

    async def fetch(self, url: str) -> Page:
        """Get a page, following vetted redirects. Raises `Refused` or `FetchFailed`."""
        try:
            async with asyncio.timeout(self._policy.total_s):
                for _ in range(REDIRECTS + 1):
                    self.check(url)
                    if self._robots is not None:
                        await self._robots.check(url)
                    page = await self._get(url)
                    if isinstance(page, Page):
                        return page
                    url = page
        except TimeoutError:
            raise FetchFailed(f"{url} took longer than {self._policy.total_s:g} s") from None
        except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException, OSError) as error:
            raise FetchFailed(f"{url} cannot be fetched: {error or type(error).__name__}") from error
        raise FetchFailed(f"{url}: more than {REDIRECTS} redirects")

    def check(self, url: str) -> SplitResult:
        """The parts of a URL that may be asked for. Raises `Refused`."""
        try:
            parts = urlsplit(url.strip())
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise Refused(f"{url!r} is not a URL ({error})") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Refused(f"{url!r} is not an http or https URL")
        if parts.username is not None or parts.password is not None:
            raise Refused(f"{url!r} holds a user name; URLs with one are not fetched")
        if port not in self._policy.ports:
            raise Refused(f"{url!r} asks for port {port}; only {sorted(self._policy.ports)} are fetched")
        if (entry := self._policy.blocklist.covers(url.strip())) is not None:
            raise Refused(f"{parts.hostname} is on the blocklist ({entry})")
        return parts

    async def _get(self, url: str) -> Page | str:
        """One request: the page, or where it redirects to."""
        headers: dict[bytes | str, bytes | str] = {
            "User-Agent": USER_AGENT,
            "Accept": "text/html,application/pdf,text/*;q=0.9,*/*;q=0.1",
            "Accept-Encoding": "gzip, deflate",
            "Accept-Language": "en",
        }
        timeouts = {"timeout": dict.fromkeys(("connect", "read", "write", "pool"), self._policy.total_s)}
        async with (
            httpcore2.AsyncConnectionPool(ssl_context=self._tls, network_backend=self._backend) as pool,
            pool.stream("GET", _ascii(url), headers=headers, extensions=timeouts) as response,
        ):
            answered = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
            if response.status in _REDIRECT_CODES and "location" in answered:
                return urljoin(url, answered["location"])
            if response.status >= 400:
                kind = NotThere if response.status < 500 else FetchFailed
                raise kind(f"{url} answered with status {response.status}")
            chunks = response.aiter_stream()
            body, truncated = await _read(chunks, answered.get("content-encoding", ""), self._policy.max_bytes)
            return Page(url, answered.get("content-type", ""), body, truncated)


def _ascii(url: str) -> str:
    """The URL with its host in punycode and everything else percent-encoded where HTTP requires it."""
    parts = urlsplit(url.strip())
    host = (parts.hostname or "").encode("idna").decode() if not _is_ascii(parts.hostname) else parts.hostname or ""
    where = f"[{host}]" if ":" in host else host
    netloc = where if parts.port is None else f"{where}:{parts.port}"
    tail = f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}"
    quoted = "".join(c if 33 <= ord(c) < 127 else "".join(f"%{b:02X}" for b in c.encode()) for c in tail)
    return f"{parts.scheme}://{netloc}{quoted}"


def _is_ascii(host: str | None) -> bool:
    return host is None or host.isascii()


async def _read(chunks: AsyncIterator[bytes], encoding: str, most: int) -> tuple[bytes, bool]:
    """The decompressed body, cut at `most` bytes while it streams; whether it was cut."""
    match encoding.strip().lower():
        case "" | "identity":
            inflate = None
        case "gzip" | "x-gzip" | "deflate":
            inflate = zlib.decompressobj(zlib.MAX_WBITS | 32)
        case other:
            raise FetchFailed(f"the page is compressed as {other!r}, which was not asked for")
    body = bytearray()
    async for chunk in chunks:
        while chunk:
            try:
                body += chunk if inflate is None else inflate.decompress(chunk, most + 1 - len(body))
            except zlib.error as error:
                raise FetchFailed(f"the page is badly compressed ({error})") from error
            if len(body) > most:
                return bytes(body[:most]), True
            chunk = b"" if inflate is None else inflate.unconsumed_tail
    return bytes(body), False
