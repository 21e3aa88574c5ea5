"""Rows of a parquet corpus, a batch at a time (needs the `parquet` extra)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import JsonValue

try:
    from arro3.io import read_parquet
except ModuleNotFoundError:
    READABLE = False
else:
    READABLE = True

MAGIC = b"PAR1"
BATCH_ROWS = 4_096


class NotParquet(Exception):
    """The file cannot be read; says why and what to do."""


def parquet_rows(corpus: Path, columns: frozenset[str]) -> Iterator[dict[str, JsonValue]]:
    """The rows of a file with those of `columns` that it has. Raises `NotParquet`."""
    if not READABLE:
        raise NotParquet(f"{str(corpus)!r}: parquet is read with the extra `parquet` (pip install 'matpo[parquet]')")
    with corpus.open("rb") as file:
        head = file.read(len(MAGIC))
        file.seek(-min(len(MAGIC), corpus.stat().st_size), 2)
        if head != MAGIC or file.read() != MAGIC:
            raise NotParquet(f"{str(corpus)!r} is not a whole parquet file")
    for batch in read_parquet(corpus, batch_size=BATCH_ROWS):
        names = [name for name in batch.column_names if name in columns]
        for values in zip(*(batch[name].to_pylist() for name in names), strict=True):
            yield dict(zip(names, values, strict=True))
