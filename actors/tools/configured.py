"""One entry of the configuration at work: live copies of its server, or what was recorded of it."""

from __future__ import annotations

import mcp_types as types

from actors.tools.cache import CallCache, RecordedTool
from actors.tools.catalog import check_names, offered
from actors.tools.pool import Backend, Nobody, PerEpisode, Shared
from matpo.config import McpServer
from matpo.errors import UserError


class ConfiguredServer:
    """A server of the configuration, whoever answers its calls."""

    def __init__(self, name: str, entry: McpServer, cache: CallCache | None) -> None:
        """`cache` is open where some server records or replays. Raises `UserError` when nothing was recorded."""
        self.name = name
        self.extras = entry.matpo
        self.live: Shared | PerEpisode | None = None
        """None where recorded calls are replayed."""
        self._cache = cache if entry.matpo.cache != "off" else None
        self._corpus = ""
        if self.extras.cache == "replay":
            self.backend: Backend = self._replayed()
        else:
            self.live = PerEpisode(name, entry) if self.extras.scope == "episode" else Shared(name, entry)
            self.backend = self.live

    async def ready(self) -> None:
        """Wait until it can be called. Raises `UserError`."""
        if self.live is not None:
            await self.live.ready()
        if self._cache is not None and isinstance(self.live, Shared):
            first = self.live.servers[0]
            self._corpus = first.corpus
            self._cache.save_listing(self.name, first.listing, first.corpus)

    def record(self, tool: types.Tool) -> RecordedTool | None:
        """The record of a tool's calls, if there is to be one."""
        return None if self._cache is None else RecordedTool(self._cache, self.name, tool, corpus=self._corpus)

    def _replayed(self) -> Nobody:
        listing = None if self._cache is None else self._cache.listing(self.name)
        if listing is None:
            raise UserError(
                f"nothing of tool server {self.name!r} is recorded in tools.cache_file; run with its matpo.cache = "
                '"record" first'
            )
        self._corpus = listing.corpus
        check_names(self.name, listing.tools, self.extras)
        return Nobody(self.name, offered(self.name, listing.tools, self.extras))
