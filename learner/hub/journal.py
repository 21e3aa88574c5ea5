"""The run's memory in SQLite: every state change is one transaction, so a killed hub continues exactly where it was.

Plain rows and counts only; which change is due is decided in `leases`, `batches` and `evaluation`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

SCHEMA_VERSION: Final = 2

SCHEMA: Final = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE groups (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    group_id TEXT NOT NULL UNIQUE,
    purpose TEXT NOT NULL CHECK (purpose IN ('train', 'eval')),
    round TEXT,
    task_id TEXT NOT NULL,
    task TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('open', 'complete', 'trained', 'filtered', 'evaluated')),
    step INTEGER,
    reason TEXT,
    opened_at REAL NOT NULL,
    CHECK ((purpose = 'eval') = (round IS NOT NULL))
) STRICT;
CREATE INDEX groups_by_state ON groups (purpose, state, seq);
CREATE TABLE episodes (
    group_seq INTEGER NOT NULL REFERENCES groups (seq),
    episode INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('waiting', 'leased', 'filled', 'abandoned')),
    attempts INTEGER NOT NULL DEFAULT 0,
    lease_id TEXT,
    tree_id TEXT UNIQUE,
    PRIMARY KEY (group_seq, episode),
    CHECK ((state = 'leased') = (lease_id IS NOT NULL)),
    CHECK ((state = 'filled') = (tree_id IS NOT NULL))
) STRICT, WITHOUT ROWID;
CREATE INDEX episodes_to_play ON episodes (group_seq, episode) WHERE state = 'waiting';
CREATE INDEX episodes_by_lease ON episodes (lease_id) WHERE lease_id IS NOT NULL;
CREATE TABLE leases (
    lease_id TEXT PRIMARY KEY,
    group_seq INTEGER NOT NULL REFERENCES groups (seq),
    actor_id TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('live', 'played', 'expired', 'returned', 'cancelled')),
    granted_at REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX leases_live ON leases (actor_id) WHERE state = 'live';
CREATE INDEX leases_by_group ON leases (group_seq);
CREATE TABLE trees (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    tree_id TEXT NOT NULL UNIQUE,
    group_seq INTEGER NOT NULL REFERENCES groups (seq),
    lease_id TEXT NOT NULL,
    episode INTEGER NOT NULL,
    actor_id TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('pending', 'trained', 'filtered', 'evaluation')),
    step INTEGER,
    reason TEXT,
    staleness INTEGER,
    oldest_version INTEGER,
    newest_version INTEGER,
    reward REAL,
    rewards TEXT NOT NULL,
    tokens INTEGER NOT NULL,
    sampled_tokens INTEGER NOT NULL,
    tool_calls INTEGER NOT NULL,
    tool_failures INTEGER NOT NULL,
    seconds REAL NOT NULL,
    received_at REAL NOT NULL
) STRICT;
CREATE INDEX trees_by_state ON trees (state, step);
CREATE INDEX trees_by_group ON trees (group_seq);
CREATE TABLE frames (
    tree_seq INTEGER PRIMARY KEY REFERENCES trees (seq),
    sizes TEXT NOT NULL,
    data BLOB NOT NULL
) STRICT;
CREATE TABLE batches (step INTEGER PRIMARY KEY, groups TEXT NOT NULL) STRICT;
CREATE TABLE steps (
    lineage INTEGER NOT NULL,
    step INTEGER NOT NULL,
    trained INTEGER NOT NULL,
    filtered INTEGER NOT NULL,
    undone INTEGER NOT NULL DEFAULT 0,
    figures TEXT NOT NULL,
    done_at REAL NOT NULL,
    PRIMARY KEY (lineage, step)
) STRICT, WITHOUT ROWID;
CREATE TABLE lineages (lineage INTEGER PRIMARY KEY, step INTEGER NOT NULL, began_at REAL NOT NULL) STRICT;
CREATE TABLE publications (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    version INTEGER NOT NULL UNIQUE,
    digest TEXT NOT NULL,
    objects TEXT NOT NULL,
    published_at REAL NOT NULL
) STRICT;
CREATE TABLE rounds (
    name TEXT PRIMARY KEY,
    label TEXT NOT NULL CHECK (label IN ('before', 'during', 'after')),
    step INTEGER NOT NULL,
    questions INTEGER NOT NULL,
    began_at REAL NOT NULL,
    finished_at REAL,
    figures TEXT,
    CHECK ((finished_at IS NULL) = (figures IS NULL))
) STRICT, WITHOUT ROWID;
"""

ARCHIVED: Final = {"groups": "seq", "leases": "lease_id", "trees": "seq", "frames": "tree_seq", "batches": "step"}
"""Tables whose rows may leave for an archive, which has the same layout, and what identifies a row."""
WAL_LIMIT_BYTES: Final = 64 * 2**20
"""The write-ahead log is cut back to this after a larger transaction."""

Value = str | int | float | bytes | None
Row = tuple[Value, ...]


class JournalUnreadable(Exception):
    """The file is not a journal this version can read; the message names it and the remedy."""


class Journal:
    """One connection, one writer. Reads see the open transaction."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[Journal]:
        """Open or create the journal for writing.

        Raises `JournalUnreadable`; on a full disk `sqlite3.OperationalError`, as a transaction does.
        """
        connection = sqlite3.connect(path, isolation_level=None, timeout=10.0)
        try:
            _prepare(connection, path)
            yield cls(connection)
        finally:
            connection.close()

    @classmethod
    @contextmanager
    def open_read_only(cls, path: Path, archive: Path | None = None) -> Iterator[Journal]:
        """Look into the journal of a live or dead run without changing it. Raises `JournalUnreadable`.

        With `archive`, where that file exists, groups that left the journal for it are found as if they never had.
        """
        if not path.is_file():
            raise JournalUnreadable(f"journal {str(path)!r} does not exist; give the folder of a run that has started")
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=10.0)
        try:
            _check_version(connection, path)
            if archive is not None and archive.is_file():
                _attach(connection, archive)
            yield cls(connection)
        finally:
            connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes within are on disk when it ends, or none of them are."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        finally:
            if self._connection.in_transaction:  # a full disk may have rolled it back already
                self._connection.execute("ROLLBACK")

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """All reads within see one moment."""
        self._connection.execute("BEGIN")
        try:
            yield
        finally:
            self._connection.execute("ROLLBACK")

    def execute(self, statement: str, values: Sequence[Value] = ()) -> int:
        """Run a statement; returns how many rows it changed."""
        return self._connection.execute(statement, values).rowcount

    def insert(self, statement: str, values: Sequence[Value] = ()) -> int:
        """Insert one row; returns its rowid."""
        cursor = self._connection.execute(statement, values)
        assert cursor.lastrowid is not None, "an INSERT has a rowid"
        return cursor.lastrowid

    def rows(self, query: str, values: Sequence[Value] = ()) -> list[Row]:
        """Every row of a query."""
        return self._connection.execute(query, values).fetchall()

    def row(self, query: str, values: Sequence[Value] = ()) -> Row | None:
        """The first row of a query."""
        found: Row | None = self._connection.execute(query, values).fetchone()
        return found

    def number(self, query: str, values: Sequence[Value] = ()) -> int:
        """The one integer a query asks for; NULL counts as 0."""
        row = self.row(query, values)
        return 0 if row is None else integer(row[0] or 0)

    def count_up(self, name: str, by: int = 1) -> None:
        """Add to a counter that is kept apart from the rows it counts, so that sums can be checked against it."""
        self.execute(
            "INSERT INTO counters VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
            (name, by),
        )

    def counter(self, name: str) -> int:
        return self.number("SELECT value FROM counters WHERE name = ?", (name,))


def integer(value: Value) -> int:
    """A column declared INTEGER NOT NULL."""
    assert isinstance(value, int), f"the journal holds {value!r} where an integer belongs"
    return value


def text(value: Value) -> str:
    """A column declared TEXT NOT NULL."""
    assert isinstance(value, str), f"the journal holds {value!r} where a text belongs"
    return value


def real(value: Value) -> float:
    """A column declared REAL NOT NULL."""
    assert isinstance(value, int | float), f"the journal holds {value!r} where a number belongs"
    return float(value)


def maybe_integer(value: Value) -> int | None:
    """A column declared INTEGER."""
    return None if value is None else integer(value)


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        # Acknowledged means on disk even if the machine loses power; one fsync serves all messages drained at once.
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT_BYTES}")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == 0:
            connection.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
    except sqlite3.OperationalError:
        raise  # says nothing about the file: opening one takes room on the disk, which may be there again in a moment
    except sqlite3.DatabaseError as error:
        raise JournalUnreadable(f"journal {str(path)!r} cannot be opened: {error}; start a new run") from error
    _check_version(connection, path)


def _attach(connection: sqlite3.Connection, archive: Path) -> None:
    """Let the names of tables mean the rows of both files. Raises `JournalUnreadable`."""
    try:
        connection.execute("ATTACH DATABASE ? AS archive", (f"{archive.resolve().as_uri()}?mode=ro",))
        for table, key in ARCHIVED.items():
            connection.execute(
                f"CREATE TEMP VIEW {table} AS SELECT * FROM main.{table} UNION ALL SELECT * FROM archive.{table}"
                # What a killed hub had copied and not yet removed is in both.
                f" WHERE {key} NOT IN (SELECT {key} FROM main.{table})"
            )
    except sqlite3.DatabaseError as error:
        raise JournalUnreadable(
            f"archive {str(archive)!r} cannot be read: {error}; move it away to do without it"
        ) from error


def _check_version(connection: sqlite3.Connection, path: Path) -> None:
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
    except sqlite3.DatabaseError as error:
        raise JournalUnreadable(f"journal {str(path)!r} cannot be read: {error}; start a new run") from error
    if version != SCHEMA_VERSION:
        raise JournalUnreadable(
            f"journal {str(path)!r} has layout {version}, this matpo reads {SCHEMA_VERSION};"
            " use the version that wrote it or start a new run"
        )
