"""The `search` and `open` tools over an index, with the disturbances a training environment wants."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from pydantic import JsonValue

from tool_servers.blocklist import Blocklist
from tool_servers.search.index import Excerpts, Index
from tool_servers.search.providers import Hit, Provider
from tool_servers.serving import Arguments, BadCall, Reply, ServedTool, text_argument, whole_argument

OPEN_CHARACTERS = 4_000
"""Text `open` returns at a time."""


@dataclass(frozen=True, slots=True)
class Presentation:
    """How hits are shown, and how they are disturbed on purpose when agents are trained to read them."""

    results: int = 5
    """Hits when the caller gives no `k`."""
    snippet_characters: int = 500
    """Longer documents are cut and name the id to `open`."""
    min_results: int | None = None
    """With `max_results`: every answer has a random number of slots in this range, and callers choose no `k`."""
    max_results: int | None = None
    shuffle: bool = False
    noise: float = 0.0
    """Probability that a slot shows a random other document of the same collection."""
    seed: int = 0

    @property
    def disturbed(self) -> bool:
        """Whether the number of slots is drawn at random."""
        return self.min_results is not None and self.max_results is not None


@dataclass(slots=True)
class SearchTools:
    """Answers for one index. Calls draw from one seeded stream, so the same calls in order get the same answers."""

    index: Index
    show: Presentation
    blocklist: Blocklist = field(default_factory=Blocklist)
    """Documents whose id is an address on it are neither found nor opened."""
    _random: random.Random = field(init=False)
    _members: dict[str | None, list[tuple[int, int]]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._random = random.Random(self.show.seed)

    def search(self, query: str, k: int, collection: str | None) -> str:
        """One line per hit, `[1] text`, best first unless shuffled."""
        show = self.show
        if show.min_results is not None and show.max_results is not None:
            k = self._random.randint(show.min_results, show.max_results)
        try:
            slots = self._found(query, k, collection)
        except KeyError:
            raise BadCall(f"there is no collection {collection!r}; {self._known_collections()}") from None
        if show.disturbed:
            slots = self._fill(slots, k, collection)
        if show.noise > 0:
            for place in range(len(slots)):
                if self._random.random() < show.noise:
                    slots[place] = self._other(slots, slots[place], collection)
        if show.shuffle:
            self._random.shuffle(slots)
        if not slots:
            return "No results."
        excerpt = self.index.excerpts(query, show.snippet_characters)
        return "\n".join(f"[{n}] {self._line(slot, excerpt)}" for n, slot in enumerate(slots, start=1))

    def open(self, doc_id: str, offset: int) -> str:
        """Up to `OPEN_CHARACTERS` characters of a document from `offset`, and how to read on."""
        if (entry := self.blocklist.covers(doc_id)) is not None:
            raise BadCall(f"{doc_id!r} is on the blocklist ({entry})")
        document = self.index.find(doc_id)
        if document is None:
            raise BadCall(f"there is no document {doc_id!r}; search names the ids")
        whole = f"{document.title}\n{document.text}" if document.title else document.text
        if offset >= max(1, len(whole)):
            raise BadCall(f"document {doc_id!r} has {len(whole)} characters; offset {offset} is past its end")
        end = offset + OPEN_CHARACTERS
        more = (
            f"\n[characters {offset} to {end} of {len(whole)}; continue with offset {end}]" if end < len(whole) else ""
        )
        return whole[offset:end] + more

    def _fill(self, slots: list[tuple[int, int]], k: int, collection: str | None) -> list[tuple[int, int]]:
        """Add random others until there are `k`, so that the number of hits tells nothing about their worth."""
        members = self._of(collection)
        filled = list(slots)
        while len(filled) < min(k, len(members)):
            candidate = self._random.choice(members)
            if candidate not in filled:
                filled.append(candidate)
        return filled

    def _other(
        self, slots: list[tuple[int, int]], instead_of: tuple[int, int], collection: str | None
    ) -> tuple[int, int]:
        members = self._of(collection)
        if len(members) <= len(slots):
            return instead_of
        while (candidate := self._random.choice(members)) in slots:
            pass
        return candidate

    def _of(self, collection: str | None) -> list[tuple[int, int]]:
        if collection not in self._members:
            self._members[collection] = [slot for slot in self.index.members(collection) if not self._blocked(slot)]
        return self._members[collection]

    def _line(self, slot: tuple[int, int], excerpt: Excerpts) -> str:
        document = self.index.document(*slot)
        text = " ".join(document.text.split())
        titled = f"{document.title}: {text}" if document.title else text
        if len(titled) <= self.show.snippet_characters:
            return titled
        more = f"… (open {document.id!r} for more)"
        if found := " ".join(excerpt(*slot).split()):
            before = "" if text.startswith(found) else "… "
            return f"{document.title}: {before}{found}{more}" if document.title else f"{before}{found}{more}"
        return f"{titled[: self.show.snippet_characters]}{more}"

    def _found(self, query: str, k: int, collection: str | None) -> list[tuple[int, int]]:
        """The best hits that the blocklist lets through."""
        asked = k
        while True:
            slots = [(segment, doc) for _, segment, doc in self.index.search(query, asked, collection)]
            allowed = [slot for slot in slots if not self._blocked(slot)]
            if len(allowed) >= k or len(slots) < asked:
                return allowed[:k]
            asked *= 2

    def _blocked(self, slot: tuple[int, int]) -> bool:
        return bool(self.blocklist) and self.blocklist.covers(self.index.document(*slot).id) is not None

    def _known_collections(self) -> str:
        names = sorted(self.index.description.collections)
        shown = ", ".join(repr(name) for name in names[:5])
        return f"there are {len(names)}: {shown}{', …' if len(names) > 5 else ''}"


def served_tools(tools: SearchTools) -> tuple[ServedTool, ...]:
    """The two tools as MCP clients see them."""

    def search(arguments: Arguments) -> Reply:
        collection = arguments.get("collection")
        if collection is not None and not isinstance(collection, str):
            raise BadCall(f"argument 'collection' must be a string, got {collection!r}")
        k = whole_argument(arguments, "k", default=tools.show.results, low=1, high=50)
        return Reply(tools.search(text_argument(arguments, "query"), k, collection))

    def open_document(arguments: Arguments) -> Reply:
        offset = whole_argument(arguments, "offset", default=0, low=0, high=2**31)
        return Reply(tools.open(text_argument(arguments, "doc_id"), offset))

    query: dict[str, JsonValue] = {"type": "string", "description": "What to look for, in plain words."}
    k: dict[str, JsonValue] = {"type": "integer", "minimum": 1, "maximum": 50, "description": "How many hits."}
    collection: dict[str, JsonValue] = {"type": "string", "description": "Search only this part of the corpus."}
    doc_id: dict[str, JsonValue] = {"type": "string", "description": "A document id from search."}
    offset: dict[str, JsonValue] = {"type": "integer", "minimum": 0, "description": "Character to start from."}
    searched: dict[str, JsonValue] = {"query": query, "collection": collection}
    if not tools.show.disturbed:
        searched["k"] = k
    return (
        ServedTool(
            name="search",
            description="Search the documents. Returns one numbered line per hit.",
            parameters={"type": "object", "properties": searched, "required": ["query"]},
            call=search,
            quick=True,
        ),
        ServedTool(
            name="open",
            description="Read a document from the search results, a part at a time.",
            parameters={
                "type": "object",
                "properties": {"doc_id": doc_id, "offset": offset},
                "required": ["doc_id"],
            },
            call=open_document,
            quick=True,
        ),
    )


def provider_tool(provider: Provider, *, results: int, snippet_characters: int) -> ServedTool:
    """The same `search` over the web; pages are read with a tool that fetches them."""

    async def search(arguments: Arguments) -> Reply:
        k = whole_argument(arguments, "k", default=results, low=1, high=50)
        hits = await provider.search(text_argument(arguments, "query"), k)
        lines = [f"[{n}] {_web_line(hit, snippet_characters)}" for n, hit in enumerate(hits, start=1)]
        return Reply("\n".join(lines) or "No results.", meta={"provider": provider.name})

    query: dict[str, JsonValue] = {"type": "string", "description": "What to look for, in plain words."}
    k: dict[str, JsonValue] = {"type": "integer", "minimum": 1, "maximum": 50, "description": "How many hits."}
    return ServedTool(
        name="search",
        description="Search the web. Returns one numbered line per hit, with its address.",
        parameters={"type": "object", "properties": {"query": query, "k": k}, "required": ["query"]},
        call=search,
    )


def _web_line(hit: Hit, most: int) -> str:
    title, text = " ".join(hit.title.split()), " ".join(hit.text.split())
    shown = f"{text[:most]}…" if len(text) > most else text
    return " ".join(part for part in (f"{title}:" if title else "", shown, f"({hit.url})") if part)
