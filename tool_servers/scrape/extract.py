"""A worker process that turns pages into text: one request a line on stdin, one answer a line on stdout.

Parsers of hostile input loop and bloat; run apart, they can be killed without losing the server.
"""

from __future__ import annotations

import json
import resource
import sys

import pypdfium2
import trafilatura

from tool_servers.scrape.exchange import Answer, Request

MEMORY_BYTES = 1_500 * 2**20


def extract(url: str, content_type: str, body: bytes) -> Answer:
    """The main text of an HTML page, all text of a PDF, or a text as it is."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "application/pdf" or body[:5] == b"%PDF-":
        return _pdf(body)
    if kind in ("", "text/html", "application/xhtml+xml") or body[:512].lstrip().lower().startswith(
        (b"<!doc", b"<html")
    ):
        return _html(url, body)
    if kind.startswith("text/") or kind.endswith(("json", "xml")):
        return Answer(title="", text=body.decode("utf-8", "replace"), error="")
    return Answer(title="", text="", error=f"it is {kind}, which cannot be read as text")


def _html(url: str, body: bytes) -> Answer:
    document = trafilatura.load_html(body)
    if document is None:
        return Answer(title="", text="", error="it is no readable HTML")
    title = (document.findtext(".//title") or "").strip()
    text = trafilatura.extract(document, url=url, output_format="markdown", include_links=False, favor_recall=True)
    if not text:
        text = " ".join("".join(document.itertext()).split())
    return Answer(title=title, text=text, error="" if text else "it holds no text")


def _pdf(body: bytes) -> Answer:
    try:
        document = pypdfium2.PdfDocument(body)
    except pypdfium2.PdfiumError as error:
        return Answer(title="", text="", error=f"it is no readable PDF ({error})")
    pages = [page.get_textpage().get_text_bounded().strip() for page in document]
    text = "\n\n".join(f"[page {number}]\n{page}" for number, page in enumerate(pages, start=1) if page)
    return Answer(title=document.get_metadata_value("Title"), text=text, error="" if text else "it holds no text")


def main() -> None:
    """Answer requests until stdin ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    while line := sys.stdin.buffer.readline():
        request: Request = json.loads(line)
        body = sys.stdin.buffer.read(request["size"])
        try:
            answer = extract(request["url"], request["content_type"], body)
        except (ValueError, RecursionError, MemoryError) as error:
            answer = Answer(title="", text="", error=f"it cannot be read ({type(error).__name__})")
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
