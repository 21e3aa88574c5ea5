"""robots.txt (RFC 9309), for those who choose to heed it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Final
from urllib.parse import urlsplit
from urllib.robotparser import RobotFileParser

from tool_servers.scrape.addresses import Refused
from tool_servers.scrape.page import FetchFailed, NotThere, Page

AGENT: Final = "matpo-scrape"
KEPT_ORIGINS: Final = 256


class Robots:
    """The rules of the last origins asked for."""

    def __init__(self, fetch: Callable[[str], Awaitable[Page]]) -> None:
        """`fetch` gets a robots.txt, as carefully as any page."""
        self._fetch = fetch
        self._rules: OrderedDict[str, RobotFileParser] = OrderedDict()

    async def check(self, url: str) -> None:
        """Raises `Refused` where the site asks robots to stay away, or its rules cannot be had (RFC 9309, 2.3.1.4)."""
        parts = urlsplit(url)
        origin = f"{parts.scheme}://{parts.netloc}"
        if origin not in self._rules:
            self._rules[origin] = await self._read(f"{origin}/robots.txt")
            if len(self._rules) > KEPT_ORIGINS:
                self._rules.popitem(last=False)
        self._rules.move_to_end(origin)
        if not self._rules[origin].can_fetch(AGENT, url):
            raise Refused(f"{url} is not for robots, says {origin}/robots.txt")

    async def _read(self, url: str) -> RobotFileParser:
        rules = RobotFileParser(url)
        try:
            page = await self._fetch(url)
        except NotThere:
            rules.parse([])  # no rules: everything is allowed
        except FetchFailed as error:
            raise Refused(f"{url} cannot be had ({error}), so nothing there is fetched") from error
        else:
            rules.parse(page.body.decode("utf-8", "replace").splitlines())
        return rules
