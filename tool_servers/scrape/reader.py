"""URLs to text: from a corpus or the web, through killable extraction workers, with the last pages kept for paging."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from tool_servers.scrape.exchange import Answer, Request
from tool_servers.scrape.fetch import Fetcher
from tool_servers.scrape.page import FetchFailed, Page

KEPT_PAGES = 64
MAX_ANSWER_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Article:
    """The readable part of a page."""

    url: str
    title: str
    text: str
    truncated: bool
    """The page was longer than what was fetched of it."""


class CorpusPage(BaseModel):
    """One line of an offline corpus."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    url: str
    text: str | None = None
    html: str | None = None
    title: str = ""

    @model_validator(mode="after")
    def _has_content(self) -> CorpusPage:
        if (self.text is None) == (self.html is None):
            raise ValueError("a page has either text or html")
        return self


def load_corpus(path: Path) -> dict[str, CorpusPage]:
    """The pages of a JSONL corpus by URL. Raises `ValueError` naming the line, `OSError` for a missing file."""
    pages = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    page = CorpusPage.model_validate_json(line)
                except ValidationError as error:
                    raise ValueError(f"{path}:{number}: {error.errors()[0]['msg']}; a row is {{url, text}}") from error
                pages[page.url] = page
    return pages


class Extractor:
    """One extraction worker at a time, restarted after it had to be killed."""

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._worker: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def extract(self, page: Page) -> Article:
        """Text of a page. Raises `FetchFailed` when it holds none or takes too long."""
        async with self._turn:
            try:
                async with asyncio.timeout(self._timeout_s):
                    answer = await self._ask(page)
            except TimeoutError:
                await self.close()
                raise FetchFailed(f"{page.url} took longer than {self._timeout_s:g} s to read") from None
            except (BrokenPipeError, ConnectionResetError, ValueError) as error:
                await self.close()
                raise FetchFailed(f"{page.url} cannot be read: the extractor died of it") from error
            except asyncio.CancelledError:
                # Its answer would be taken for that of the next page.
                await self.close()
                raise
        if answer["error"]:
            raise FetchFailed(f"{page.url} cannot be read: {answer['error']}")
        return Article(page.url, answer["title"], answer["text"], page.truncated)

    async def _ask(self, page: Page) -> Answer:
        worker = self._worker
        if worker is None or worker.returncode is not None:
            worker = self._worker = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tool_servers.scrape.extract",
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, limit=MAX_ANSWER_BYTES,
                env={"PATH": os.environ.get("PATH", ""), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )  # fmt: skip
        assert worker.stdin is not None and worker.stdout is not None, "pipes"
        header = Request(url=page.url, content_type=page.content_type, size=len(page.body))
        worker.stdin.write(json.dumps(header).encode() + b"\n" + page.body)
        await worker.stdin.drain()
        line = await worker.stdout.readline()
        if not line:
            raise BrokenPipeError("the worker ended")
        answer: Answer = json.loads(line)
        return answer

    async def close(self) -> None:
        """Kill the worker; the next page gets a new one."""
        worker, self._worker = self._worker, None
        if worker is None:
            return
        assert worker.stdin is not None and worker.stdout is not None, "pipes"
        with suppress(ProcessLookupError):
            worker.kill()
        worker.stdin.close()
        # Read to the end, so that the event loop lets go of the pipe as well as of the process.
        while await worker.stdout.read(65_536):
            pass
        await worker.wait()


class Reader:
    """Articles by URL."""

    def __init__(self, fetcher: Fetcher | None, corpus: dict[str, CorpusPage], *, extract_s: float) -> None:
        self._fetcher = fetcher
        self._corpus = corpus
        self._extractor = Extractor(timeout_s=extract_s)
        self._kept: OrderedDict[str, Article] = OrderedDict()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Read within this block; the worker dies with it."""
        try:
            yield
        finally:
            await self._extractor.close()

    async def read(self, url: str) -> Article:
        """The article at a URL. Raises `Refused` or `FetchFailed`."""
        if url in self._kept:
            self._kept.move_to_end(url)
            return self._kept[url]
        article = await self._read(url)
        self._kept[url] = article
        if len(self._kept) > KEPT_PAGES:
            self._kept.popitem(last=False)
        return article

    async def _read(self, url: str) -> Article:
        page = self._corpus.get(url)
        if page is not None and page.text is not None:
            return Article(url, page.title, page.text, truncated=False)
        if page is not None and page.html is not None:
            return await self._extractor.extract(Page(url, "text/html", page.html.encode(), truncated=False))
        if self._fetcher is None:
            raise FetchFailed(f"{url} is not among the {len(self._corpus)} pages of the offline corpus")
        return await self._extractor.extract(await self._fetcher.fetch(url))
