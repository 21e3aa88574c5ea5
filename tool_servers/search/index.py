"""A BM25 index of a corpus file in tantivy, in memory or in a folder that is reused while the corpus is unchanged."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import orjson
import tantivy
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, JsonValue, ValidationError

from tool_servers.search.parquet import NotParquet, parquet_rows

Tokenizer = Literal["en_stem", "default"]
COLUMNS = frozenset({"id", "text", "contents", "title", "collection"})
DESCRIPTION_FILE = "matpo-search.json"
_NOT_WORDS = re.compile(r"[^\w\s]+")


Excerpts = Callable[[int, int], str]
"""Segment and document → the part of its text to show; empty when no word of the query is in its text."""


class CorpusError(Exception):
    """The corpus or the index folder cannot be used; names the place and the remedy."""


class Row(BaseModel):
    """One document of a corpus file; numbers may serve as ids, and `contents` as `text`."""

    model_config = ConfigDict(frozen=True, extra="ignore", coerce_numbers_to_str=True)

    id: str
    text: str = Field(validation_alias=AliasChoices("text", "contents"))
    title: str = ""
    collection: str = ""
    """Searches can be confined to one collection; a corpus without the field has a single one."""


class Description(BaseModel):
    """What an index holds and what it was built from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    corpus: str
    corpus_bytes: int
    corpus_modified_ns: int
    tokenizer: Tokenizer
    documents: int
    collections: dict[str, int]
    """Documents per collection."""


@dataclass(frozen=True, slots=True)
class Document:
    """One document as it was in the corpus."""

    id: str
    title: str
    text: str


class Index:
    """Search, open and enumerate the documents of one corpus."""

    def __init__(self, index: tantivy.Index, description: Description) -> None:
        index.reload()
        self.description = description
        self._index = index
        self._searcher = index.searcher()
        self._within = {
            name: tantivy.Query.const_score_query(tantivy.Query.term_query(index.schema, "collection", name), 0.0)
            for name in description.collections
        }

    def search(self, query: str, limit: int, collection: str | None = None) -> list[tuple[float, int, int]]:
        """The best hits as (BM25 score, segment, document); query syntax is plain words.

        Raises `KeyError` for a collection that does not exist.
        """
        parsed = self._parse(query)
        if collection is not None:
            parsed = tantivy.Query.boolean_query(
                [(tantivy.Occur.Must, self._within[collection]), (tantivy.Occur.Must, parsed)]
            )
        hits = self._searcher.search(parsed, limit, count=False).hits
        return [(score, address.segment_ord, address.doc) for score, address in hits]

    def excerpts(self, query: str, most_characters: int) -> Excerpts:
        """Finds the part of a document that has most of the query's words."""
        generator = tantivy.SnippetGenerator.create(self._searcher, self._parse(query), self._index.schema, "text")
        generator.set_max_num_chars(most_characters)

        def excerpt(segment: int, number: int) -> str:
            fragment: str = generator.snippet_from_doc(
                self._searcher.doc(tantivy.DocAddress(segment, number))
            ).fragment()
            return fragment

        return excerpt

    def _parse(self, query: str) -> tantivy.Query:
        words = _NOT_WORDS.sub(" ", query).lower()
        parsed, _ = self._index.parse_query_lenient(words, ["title", "text"])
        return parsed

    def document(self, segment: int, number: int) -> Document:
        """The stored document at an address that `search` or `members` gave."""
        stored = self._searcher.doc(tantivy.DocAddress(segment, number))
        return Document(id=stored["id"][0], title=stored["title"][0], text=stored["text"][0])

    def find(self, doc_id: str) -> Document | None:
        """The document with this id."""
        query = tantivy.Query.term_query(self._index.schema, "id", doc_id)
        hits = self._searcher.search(query, 1, count=False).hits
        return self.document(hits[0][1].segment_ord, hits[0][1].doc) if hits else None

    def members(self, collection: str | None) -> list[tuple[int, int]]:
        """Addresses of every document of a collection (of the corpus, when None), in index order."""
        query = tantivy.Query.all_query() if collection is None else self._within[collection]
        limit = self.description.documents if collection is None else self.description.collections[collection]
        hits = self._searcher.search(query, max(1, limit), count=False).hits
        return sorted((address.segment_ord, address.doc) for _, address in hits)


def open_index(
    corpus: Path | None, folder: Path | None, tokenizer: Tokenizer, *, progress: Callable[[int], None] | None = None
) -> Index:
    """Open the index in `folder`, building it first when it is missing or not of this corpus; in memory without one.

    Raises `CorpusError`.
    """
    if corpus is None and folder is None:
        raise CorpusError("nothing to serve; give --corpus FILE.jsonl or --index DIR")
    if corpus is not None and not corpus.is_file():
        raise CorpusError(f"corpus {str(corpus)!r} does not exist; give --corpus a JSONL or parquet file")
    if folder is None:
        assert corpus is not None, "checked above"
        return _build(corpus, None, tokenizer, progress)
    held = _describe(folder)
    if corpus is None:
        if held is None:
            raise CorpusError(f"{str(folder)!r} holds no index; build it with `index CORPUS --out {folder}`")
        return Index(tantivy.Index(_schema(held.tokenizer), path=str(folder)), held)
    stat = corpus.stat()
    wanted = (str(corpus.resolve()), stat.st_size, stat.st_mtime_ns, tokenizer)
    if held is not None and (held.corpus, held.corpus_bytes, held.corpus_modified_ns, held.tokenizer) == wanted:
        return Index(tantivy.Index(_schema(tokenizer), path=str(folder)), held)
    return _build(corpus, folder, tokenizer, progress)


def _describe(folder: Path) -> Description | None:
    path = folder / DESCRIPTION_FILE
    if not path.is_file():
        return None
    try:
        return Description.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise CorpusError(f"{str(path)!r} is not an index description; remove the folder and build again") from error


def _schema(tokenizer: Tokenizer) -> tantivy.Schema:
    builder = tantivy.SchemaBuilder()
    builder.add_text_field("id", stored=True, tokenizer_name="raw", index_option="basic")
    builder.add_text_field("collection", stored=False, tokenizer_name="raw", index_option="basic")
    builder.add_text_field("title", stored=True, tokenizer_name=tokenizer)
    builder.add_text_field("text", stored=True, tokenizer_name=tokenizer)
    return builder.build()


def _build(corpus: Path, folder: Path | None, tokenizer: Tokenizer, progress: Callable[[int], None] | None) -> Index:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        strange = sorted(p.name for p in folder.iterdir()) if not (folder / DESCRIPTION_FILE).exists() else []
        if strange:
            raise CorpusError(f"{str(folder)!r} is not empty (it holds {strange[0]!r}); give a new folder")
        for old in folder.iterdir():
            old.unlink()
    index = tantivy.Index(_schema(tokenizer), path=None if folder is None else str(folder))
    # One thread keeps documents in corpus order within a segment, so that a seed means the same everywhere.
    writer = index.writer(128_000_000, 1)
    collections: Counter[str] = Counter()
    for number, row in enumerate(_rows(corpus), start=1):
        writer.add_document(tantivy.Document(id=row.id, collection=row.collection, title=row.title, text=row.text))
        collections[row.collection] += 1
        if progress is not None and number % 10_000 == 0:
            progress(number)
    writer.commit()
    writer.wait_merging_threads()
    stat = corpus.stat()
    description = Description(
        corpus=str(corpus.resolve()),
        corpus_bytes=stat.st_size,
        corpus_modified_ns=stat.st_mtime_ns,
        tokenizer=tokenizer,
        documents=collections.total(),
        collections=dict(collections),
    )
    if folder is not None:
        # Written last and renamed into place: a build that was killed leaves a folder without it, not a bad index.
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as out:
            out.write(orjson.dumps(description.model_dump()))
        Path(out.name).rename(folder / DESCRIPTION_FILE)
    return Index(index, description)


def _rows(corpus: Path) -> Iterator[Row]:
    for number, raw in _numbered(corpus):
        try:
            yield Row.model_validate_json(raw) if isinstance(raw, bytes) else Row.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the line"
            raise CorpusError(f"{corpus}:{number}: {where}: {first['msg']}; a row is {{id, text}}") from error


def _numbered(corpus: Path) -> Iterator[tuple[int, bytes | dict[str, JsonValue]]]:
    """Each row and its number: JSON as it is in the file, or the fields of a parquet row that are not null."""
    if corpus.suffix == ".parquet":
        try:
            for number, row in enumerate(parquet_rows(corpus, COLUMNS), start=1):
                yield number, {name: value for name, value in row.items() if value is not None}
        except NotParquet as error:
            raise CorpusError(str(error)) from error
        return
    with corpus.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, line
