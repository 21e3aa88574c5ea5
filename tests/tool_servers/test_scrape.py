"""The scrape server: what it refuses to fetch, how much it takes in, and what it makes of it."""

from __future__ import annotations

import asyncio
import gzip
import ipaddress
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pypdfium2
import pytest
from pydantic import JsonValue

from tests.tool_servers.using import use
from tool_servers.scrape.__main__ import scrape_tool
from tool_servers.scrape.addresses import Refused, vet
from tool_servers.scrape.fetch import Fetcher, Policy
from tool_servers.scrape.page import FetchFailed, NotThere, Page
from tool_servers.scrape.reader import Extractor, Reader, load_corpus
from tool_servers.scrape.robots import Robots
from tool_servers.serving import BadCall

LOOPBACK = ipaddress.ip_network("127.0.0.0/8")
PARAGRAPH = "<p>" + "The tower was built in 1889 by Gustave. " * 8 + "</p>"


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://localhost/",
        "http://127.1/",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0x7f.1/",
        "http://0177.0.0.1/",
        "http://0.0.0.0/",
        "http://0/",
        "http://[::]/",
        "http://[::1]/",
        "http://[0:0:0:0:0:0:0:1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:7f00:1]/",
        "http://[::127.0.0.1]/",
        "http://[64:ff9b::7f00:1]/",
        "http://[2002:7f00:1::]/",
        "http://[fe80::1]/",
        "http://[fc00::1]/",
        "http://[fec0::1]/",
        "http://[fd00:ec2::254]/",
        "http://[ff02::1]/",
        "http://10.0.0.1/",
        "http://172.16.0.1/",
        "http://192.168.1.1/",
        "http://100.64.0.1/",
        "http://100.100.100.200/",
        "http://169.254.169.254/latest/meta-data/",
        "http://168.63.129.16/",
        "http://198.18.0.1/",
        "http://224.0.0.1/",
        "http://240.0.0.1/",
        "http://255.255.255.255/",
        "http://user@example.com/",
        "http://127.0.0.1:22/",
        "http://example.com:6379/",
        "file:///etc/passwd",
        "ftp://example.com/",
        "gopher://127.0.0.1/",
        "http:///path",
        "javascript:alert(1)",
        "http://[::1",
    ],
)
async def test_inside_addresses_are_refused_in_every_notation(url: str) -> None:
    async with asyncio.timeout(10):
        with pytest.raises(Refused):
            await Fetcher(Policy()).fetch(url)


def test_public_addresses_are_allowed_and_an_allowed_network_too() -> None:
    for address in ("93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "::ffff:8.8.8.8"):
        vet(address)
    vet("127.0.0.1", (LOOPBACK,))
    vet("::ffff:127.0.0.1", (LOOPBACK,))


@dataclass
class Resolver:
    """Answers each lookup with the next of its answers, as a rebinding name server does."""

    answers: list[Sequence[str]]
    asked: list[str] = field(default_factory=list)

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(f"{host}:{port}")
        return self.answers[min(len(self.asked), len(self.answers)) - 1]


class Site(BaseHTTPRequestHandler):
    """Pages a scraper meets."""

    def do_GET(self) -> None:
        body, headers, status = b"", {"Content-Type": "text/html"}, 200
        match self.path:
            case "/page":
                body = f"<html><head><title>Tower</title></head><body><nav>Menu</nav>{PARAGRAPH}</body></html>".encode()
            case "/moved":
                status, headers = 302, {"Location": "/page"}
            case "/inside":
                status, headers = 302, {"Location": "http://169.254.169.254/latest"}
            case "/loop":
                status, headers = 302, {"Location": "/loop"}
            case "/bomb":
                body, headers = gzip.compress(b"a" * 10**7), {"Content-Type": "text/plain", "Content-Encoding": "gzip"}
            case "/gzip":
                body, headers = gzip.compress(b"plain"), {"Content-Type": "text/plain", "Content-Encoding": "gzip"}
            case "/picture":
                body, headers = b"\x89PNG", {"Content-Type": "image/png"}
            case "/robots.txt":
                body = b"User-agent: matpo-scrape\nDisallow: /private\n"
            case "/secret":
                body, headers = self.headers.as_string().encode(), {"Content-Type": "text/plain"}
            case _:
                status = 404
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(body)
        except OSError:
            return  # the scraper had enough

    def log_message(self, format: str, *args: object) -> None:
        """Quietly."""


@pytest.fixture(scope="module")
def site() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def policy(port: int, *, max_bytes: int = 2**20) -> Policy:
    ports = frozenset({80, 443, port})
    return Policy(ports=ports, allowed_networks=(LOOPBACK,), total_s=10, max_bytes=max_bytes)


async def test_a_name_that_resolves_anew_to_the_inside_is_resolved_once_and_only_vetted_addresses_are_met() -> None:
    inside = Resolver([["93.184.216.34", "127.0.0.1"]])
    with pytest.raises(Refused, match=r"address 127\.0\.0\.1 is not public"):
        await Fetcher(Policy(), resolve=inside).fetch("http://rebind.example/")
    assert inside.asked == ["rebind.example:80"]


async def test_a_redirect_to_the_same_name_is_vetted_again_with_its_new_address(site: int) -> None:
    # The first lookup gives an allowed address, whose page redirects; the second gives one that is not.
    rebinding = Resolver([["127.0.0.1"], ["10.0.0.7"]])
    with pytest.raises(Refused, match=r"address 10\.0\.0\.7 is not public"):
        await Fetcher(policy(site), resolve=rebinding).fetch(f"http://rebind.example:{site}/moved")
    assert len(rebinding.asked) == 2


async def test_the_connection_goes_to_the_vetted_address_with_the_names_host_header(site: int) -> None:
    page = await Fetcher(policy(site), resolve=Resolver([["127.0.0.1"]])).fetch(f"http://named.example:{site}/secret")
    headers = page.body.decode().lower()
    assert f"host: named.example:{site}" in headers
    assert "cookie" not in headers


async def test_no_proxy_is_taken_from_the_environment(site: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    assert (await Fetcher(policy(site)).fetch(f"http://127.0.0.1:{site}/page")).content_type == "text/html"


async def test_redirects_are_followed_but_not_for_ever_and_not_inside(site: int) -> None:
    fetcher = Fetcher(policy(site))
    assert (await fetcher.fetch(f"http://127.0.0.1:{site}/moved")).url == f"http://127.0.0.1:{site}/page"
    with pytest.raises(FetchFailed, match="more than 5 redirects"):
        await fetcher.fetch(f"http://127.0.0.1:{site}/loop")
    with pytest.raises(Refused, match=r"169\.254\.169\.254 is not public"):
        await fetcher.fetch(f"http://127.0.0.1:{site}/inside")


async def test_robots_txt_is_heeded_where_that_was_chosen(site: int) -> None:
    polite = Fetcher(replace(policy(site), robots=True))
    assert (await polite.fetch(f"http://127.0.0.1:{site}/page")).content_type == "text/html"
    with pytest.raises(Refused, match=r"/private/x is not for robots, says .*/robots\.txt"):
        await polite.fetch(f"http://127.0.0.1:{site}/private/x")
    with pytest.raises(FetchFailed, match="status 404"):
        await Fetcher(policy(site)).fetch(f"http://127.0.0.1:{site}/private/x")


async def test_a_site_whose_robots_txt_cannot_be_had_is_left_alone_and_one_without_is_open() -> None:
    async def absent(url: str) -> Page:
        raise NotThere(f"{url} answered with status 404")

    async def down(url: str) -> Page:
        raise FetchFailed(f"{url} answered with status 503")

    await Robots(absent).check("http://x/page")
    with pytest.raises(Refused, match=r"http://x/robots\.txt cannot be had"):
        await Robots(down).check("http://x/page")


async def test_a_body_is_cut_after_decompression(site: int) -> None:
    fetcher = Fetcher(policy(site, max_bytes=100_000))
    bomb = await fetcher.fetch(f"http://127.0.0.1:{site}/bomb")
    assert (len(bomb.body), bomb.truncated) == (100_000, True)
    whole = await fetcher.fetch(f"http://127.0.0.1:{site}/gzip")
    assert (whole.body, whole.truncated) == (b"plain", False)


async def test_a_server_that_never_answers_ends_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:  # the system accepts; nobody ever reads
        port = listening.getsockname()[1]
        slow = Policy(ports=frozenset({port}), allowed_networks=(LOOPBACK,), total_s=0.2)
        with pytest.raises(FetchFailed, match=r"took longer than 0\.2 s"):
            await Fetcher(slow).fetch(f"http://127.0.0.1:{port}/")


async def test_pages_are_read_as_text_a_part_at_a_time_and_failures_told(site: int) -> None:
    reader = Reader(Fetcher(policy(site)), {}, extract_s=20)
    tool = scrape_tool(reader)
    async with reader.open():
        url = f"http://127.0.0.1:{site}/page"
        first = await use(tool, {"url": url, "max_chars": 40})
        whole = await use(tool, {"url": url})
        assert whole.text.startswith("# Tower\n\nThe tower was built in 1889 by Gustave.")
        assert "Menu" not in whole.text
        assert first.text == f"{whole.text[:40]}\n[characters 0 to 40 of {len(whole.text)}; continue with offset 40]"
        assert (await use(tool, {"url": url, "offset": 40})).text == whole.text[40:]
        wrong: list[tuple[dict[str, JsonValue], str]] = [
            ({"url": f"http://127.0.0.1:{site}/none"}, "answered with status 404"),
            ({"url": f"http://127.0.0.1:{site}/picture"}, "it is image/png, which cannot be read as text"),
            ({"url": "http://10.0.0.1/"}, "address 10.0.0.1 is not public"),
            ({"url": url, "offset": 100_000}, "is past its end"),
        ]
        for arguments, words in wrong:
            with pytest.raises(BadCall, match=words):
                await use(tool, arguments)


async def test_an_extractor_that_hangs_is_killed_and_replaced() -> None:
    extractor = Extractor(timeout_s=0.05)
    nested = Page("http://x/", "text/html", b"<div>" * 200_000 + b"deep", truncated=False)
    with pytest.raises(FetchFailed, match=r"took longer than 0\.05 s to read"):
        await extractor.extract(nested)
    later = Extractor(timeout_s=20)
    try:
        article = await later.extract(Page("http://x/", "text/plain", b"fine", truncated=False))
        assert article.text == "fine"
    finally:
        await later.close()


async def test_an_offline_corpus_is_all_there_is(tmp_path: Path) -> None:
    path = tmp_path / "pages.jsonl"
    rows = [
        {"url": "http://a/", "text": "A page."},
        {"url": "http://b/", "html": f"<html><body>{PARAGRAPH}</body></html>"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader = Reader(None, load_corpus(path), extract_s=20)
    async with reader.open():
        assert (await reader.read("http://a/")).text == "A page."
        assert "Gustave" in (await reader.read("http://b/")).text
        with pytest.raises(FetchFailed, match="not among the 2 pages of the offline corpus"):
            await reader.read("http://c/")
    path.write_text('{"url": "http://a/"}\n')
    with pytest.raises(ValueError, match=r"pages\.jsonl:1: .*either text or html"):
        load_corpus(path)


async def test_a_pdf_is_read_page_by_page_and_a_broken_one_told() -> None:
    extractor = Extractor(timeout_s=20)
    try:
        article = await extractor.extract(Page("http://x/p.pdf", "application/pdf", pdf("Hello PDF"), truncated=False))
        assert article.text == "[page 1]\nHello PDF"
        with pytest.raises(FetchFailed, match="no readable PDF"):
            await extractor.extract(Page("http://x/p.pdf", "application/pdf", b"%PDF-1.4 broken", truncated=False))
    finally:
        await extractor.close()


def pdf(text: str) -> bytes:
    """The smallest document with one line on one page; pdfium repairs the missing cross-reference table."""
    stream = f"BT /F1 24 Tf 72 700 Td ({text}) Tj ET"
    body = (
        "%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n"
        "3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R"
        "/Resources<</Font<</F1<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>>>>>>>endobj\n"
        f"4 0 obj<</Length {len(stream)}>>stream\n{stream}\nendstream endobj\ntrailer<</Root 1 0 R>>\n%%EOF\n"
    )
    document = pypdfium2.PdfDocument(body.encode())
    assert len(document) == 1
    return body.encode()
