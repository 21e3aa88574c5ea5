"""Notes every tree anybody was promised, from outside: rows of the growing journal, files of the outboxes."""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import dataclass, field

import anyio

from tests.chaos.job import Job

OUTBOX_EVERY_S, JOURNAL_EVERY = 0.1, 10
SUFFIX = ".tree"


@dataclass(slots=True)
class Watch:
    """Trees seen so far."""

    job: Job
    committed: set[str] = field(default_factory=set)
    finished: set[str] = field(default_factory=set)
    """Seen in the outbox of an actor."""
    _last_seq: int = 0

    async def forever(self) -> None:
        """Look until cancelled; trees that pile up while the hub is away are surely seen."""
        while True:
            for _ in range(JOURNAL_EVERY):
                self.finished |= self.waiting()
                await anyio.sleep(OUTBOX_EVERY_S)
            self.read_journal()

    def waiting(self) -> set[str]:
        """Trees in outboxes now."""
        return {file.stem for outbox in self.job.outboxes for file in outbox.glob(f"*/*{SUFFIX}")}

    def read_journal(self) -> None:
        """Note the rows that are new."""
        question = "SELECT seq, tree_id FROM trees WHERE seq > ? ORDER BY seq"
        with contextlib.suppress(sqlite3.OperationalError):  # a hub that is just being started holds the lock
            with contextlib.closing(sqlite3.connect(f"file:{self.job.run.journal}?mode=ro", uri=True)) as journal:
                rows = journal.execute(question, (self._last_seq,)).fetchall()
            self.committed |= {tree for _, tree in rows}
            self._last_seq = max((seq for seq, _ in rows), default=self._last_seq)

    def promised(self) -> set[str]:
        """Trees that must be accounted for: committed once, or finished and not waiting any more."""
        self.read_journal()
        return self.committed | (self.finished - self.waiting())
