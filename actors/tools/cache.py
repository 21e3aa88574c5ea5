"""Records what tools answered, in SQLite, and replays it: the same call gets the same answer, without its server."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import anyio
import mcp_types as types
import orjson
import structlog
from pydantic import JsonValue, TypeAdapter

from actors.flights import Flights
from actors.tools.catalog import schema_hash
from matpo.errors import UserError
from protocols.records import Outcome

_SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
    key BLOB PRIMARY KEY, server TEXT NOT NULL, tool TEXT NOT NULL, schema TEXT NOT NULL, corpus TEXT NOT NULL,
    arguments TEXT NOT NULL, text TEXT NOT NULL, seconds REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS listings (
    server TEXT PRIMARY KEY, tools TEXT NOT NULL, corpus TEXT NOT NULL) WITHOUT ROWID;
"""
BUSY_S = 2.0
"""How long another actor of this machine may hold the file; a write takes well under a millisecond."""
_TOOLS: TypeAdapter[tuple[types.Tool, ...]] = TypeAdapter(tuple[types.Tool, ...])
_log = structlog.get_logger("tools")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call came to, as the model reads it."""

    text: str
    outcome: Outcome
    recorded: bool = False


@dataclass(frozen=True, slots=True)
class Listing:
    """The tools a server had when it was recorded, and the version of its data."""

    tools: tuple[types.Tool, ...]
    corpus: str


class CallCache:
    """The file of recorded calls. Several actors may share it."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    @classmethod
    @contextmanager
    def open(cls, path: Path, *, option: str = "tools.cache_file") -> Iterator[Self]:
        """Open or make the file for the length of the block. Raises `UserError`, which names the `option`."""
        with closing(_opened(path, option)) as database:
            yield cls(database)

    def save_listing(self, server: str, tools: Sequence[types.Tool], corpus: str) -> None:
        """Keep what the server offers, so that it can be replayed without it."""
        content = _TOOLS.dump_json(tuple(tools), by_alias=True, exclude_none=True).decode()
        self._database.execute("INSERT OR REPLACE INTO listings VALUES (?, ?, ?)", (server, content, corpus))

    def listing(self, server: str) -> Listing | None:
        """What was kept of the server."""
        row = self._database.execute("SELECT tools, corpus FROM listings WHERE server = ?", (server,)).fetchone()
        return None if row is None else Listing(_TOOLS.validate_json(row[0]), row[1])

    def find(self, key: bytes) -> str | None:
        """The recorded text of a call; None too, and a line in the log, where the file cannot be read."""
        try:
            row = self._database.execute("SELECT text FROM calls WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            _log.warning("recorded calls cannot be read", reason=str(error))
            return None
        return None if row is None else str(row[0])

    def keep(self, key: bytes, facts: tuple[str, str, str, str, str], text: str, seconds: float) -> None:
        """Record a call: (server, tool, schema, corpus, arguments), what it answered and how long that took.

        Where two actors record the same call, the first stays. One that cannot be recorded is a line in the log.
        """
        try:
            self._database.execute(
                "INSERT OR IGNORE INTO calls VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (key, *facts, text, seconds)
            )
        except sqlite3.Error as error:
            _log.warning("a call could not be recorded", reason=str(error))


class RecordedTool:
    """The calls of one tool: from the record if they are there, else made (once, whoever asks) and recorded."""

    def __init__(self, cache: CallCache, server: str, tool: types.Tool, *, corpus: str) -> None:
        self._cache = cache
        self._facts = (server, tool.name, schema_hash([tool]), corpus)
        self._flights = Flights[Answer]()

    async def answer(self, arguments: Mapping[str, JsonValue], ask: Callable[[], Awaitable[Answer]]) -> Answer:
        """The recorded answer, or that of `ask`, which only one of several that ask the same at a time makes.

        Errors are handed to all who waited for them and never recorded.
        """
        facts = (*self._facts, orjson.dumps(arguments, option=orjson.OPT_SORT_KEYS).decode())
        key = hashlib.sha256(orjson.dumps(facts)).digest()

        async def found_or_asked() -> Answer:
            if (text := self._cache.find(key)) is not None:
                return Answer(text, "ok", recorded=True)
            began = anyio.current_time()
            answer = await ask()
            if answer.outcome == "ok":
                self._cache.keep(key, facts, answer.text, anyio.current_time() - began)
            return answer

        return await self._flights.once(key, found_or_asked)


def _opened(path: Path, option: str) -> sqlite3.Connection:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            database.executescript(_SCHEMA)
        except sqlite3.Error:
            database.close()
            raise
    except (OSError, sqlite3.Error) as error:
        raise UserError(f"{option} {str(path)!r} cannot be used ({error}); give another or delete it") from error
    return database
