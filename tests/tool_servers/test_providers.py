"""Web search by provider, against local servers that answer as the providers' own documentation shows."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import anyio
import pytest
from pydantic import JsonValue

from tests.tool_servers.using import use
from tool_servers.blocklist import Blocklist
from tool_servers.search.providers import MOST_BYTES, PROVIDERS, Name, Provider, ProviderError
from tool_servers.search.tools import provider_tool
from tool_servers.serving import Unavailable

ROOT = Path(__file__).parents[2]
KEY = "sk-hunter2"
ANSWERS: dict[Name, dict[str, JsonValue]] = {
    "serper": {
        "searchParameters": {"q": "lund", "type": "search", "engine": "google"},
        "knowledgeGraph": {"title": "Lund", "type": "City in Sweden"},
        "organic": [
            {"title": "Lund", "link": "https://a.example/lund", "snippet": "A city in\nSweden.", "position": 1},
            {"title": "Blocked", "link": "https://bad.example/", "snippet": "No.", "position": 2},
            {"title": "Lund University", "link": "https://b.example/", "position": 3},
        ],
        "credits": 1,
    },
    "brave": {
        "type": "search",
        "query": {"original": "lund", "more_results_available": True},
        "web": {
            "type": "search",
            "results": [
                {
                    "title": "Lund",
                    "url": "https://a.example/lund",
                    "description": "A city in Sweden.",
                    "language": "en",
                },
                {"title": "Blocked", "url": "https://bad.example/", "description": "No."},
                {"title": "Lund University", "url": "https://b.example/", "extra_snippets": []},
            ],
        },
    },
    "tavily": {
        "query": "lund",
        "answer": None,
        "images": [],
        "results": [
            {"title": "Lund", "url": "https://a.example/lund", "content": "A city in Sweden.", "score": 0.9},
            {"title": "Blocked", "url": "https://bad.example/", "content": "No.", "score": 0.8},
            {"title": "Lund University", "url": "https://b.example/", "content": "", "raw_content": None, "score": 0.7},
        ],
        "response_time": 1.67,
    },
    "searxng": {
        "query": "lund",
        "number_of_results": 0,
        "results": [
            {
                "url": "https://a.example/lund",
                "title": "Lund",
                "content": "A city in Sweden.",
                "engine": "x",
                "score": 1.0,
            },
            {"url": "https://bad.example/", "title": "Blocked", "content": "No."},
            {"url": "https://b.example/", "title": "Lund University", "content": None},
        ],
        "answers": [],
        "infoboxes": [],
        "unresponsive_engines": [["y", "timeout"]],
    },
}


@dataclass
class Fake:
    """What a local provider answers, and what it was asked."""

    body: bytes
    status: int = 200
    asked: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    silent: threading.Event | None = None
    """It answers nothing until this is set."""

    @contextmanager
    def serve(self) -> Iterator[str]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                sent = self.rfile.read(int(self.headers.get("Content-Length", "0")))
                fake.asked.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, sent))
                if fake.silent is not None:
                    fake.silent.wait(20)
                self.send_response(fake.status)
                self.send_header("Content-Length", str(len(fake.body)))
                self.end_headers()
                try:
                    self.wfile.write(fake.body)
                except ConnectionError:
                    self.close_connection = True

            do_POST = do_GET

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            try:
                yield f"http://127.0.0.1:{server.server_port}"
            finally:
                if self.silent is not None:
                    self.silent.set()
                server.shutdown()
                thread.join()


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("SERPER_API_KEY", "BRAVE_API_KEY", "TAVILY_API_KEY"):
        monkeypatch.setenv(variable, KEY)


async def answer(name: Name, fake: Fake, arguments: dict[str, JsonValue], *, timeout_s: float = 10.0) -> str:
    blocklist = Blocklist(frozenset({"bad.example"}))
    with fake.serve() as address, anyio.fail_after(20):
        provider = Provider(name, address=address + "/", timeout_s=timeout_s, blocklist=blocklist)
        async with provider.open():
            return (await use(provider_tool(provider, results=5, snippet_characters=100), arguments)).text


@pytest.mark.parametrize("name", PROVIDERS)
async def test_every_providers_answer_becomes_the_same_lines_without_what_is_blocked(name: Name) -> None:
    said = await answer(name, Fake(json.dumps(ANSWERS[name]).encode()), {"query": "lund", "k": 5})
    assert said == "[1] Lund: A city in Sweden. (https://a.example/lund)\n[2] Lund University: (https://b.example/)"
    few = await answer(name, Fake(json.dumps(ANSWERS[name]).encode()), {"query": "lund", "k": 1})
    assert few == "[1] Lund: A city in Sweden. (https://a.example/lund)"


@pytest.mark.parametrize(("name", "empty"), [("serper", {}), ("brave", {"type": "search"}), ("tavily", {"results": []}),
                                             ("searxng", {"results": []})])  # fmt: skip
async def test_nothing_found_is_said(name: Name, empty: dict[str, JsonValue]) -> None:
    assert await answer(name, Fake(json.dumps(empty).encode()), {"query": "lund"}) == "No results."


async def test_each_is_asked_as_it_documents() -> None:
    asked, keyed = {}, {}
    for name in PROVIDERS:
        fake = Fake(json.dumps(ANSWERS[name]).encode())
        await answer(name, fake, {"query": "où est Lund?", "k": 30})
        ((method, path, headers, body),) = fake.asked
        asked[name] = method, urlsplit(path).path, parse_qs(urlsplit(path).query), json.loads(body or b"null")
        assert KEY not in path
        keyed[name] = {header: value for header, value in headers.items() if KEY in value}
    assert keyed == {
        "serper": {"x-api-key": KEY},
        "brave": {"x-subscription-token": KEY},
        "tavily": {"authorization": f"Bearer {KEY}"},
        "searxng": {},
    }
    query = "où est Lund?"
    assert asked == {
        "serper": ("POST", "/search", {}, {"q": query, "num": 30}),
        "brave": ("GET", "/res/v1/web/search", {"q": [query], "count": ["20"], "text_decorations": ["false"]}, None),
        "tavily": ("POST", "/search", {}, {"query": query, "max_results": 20}),
        "searxng": ("GET", "/search", {"q": [query], "format": ["json"]}, None),
    }


@pytest.mark.parametrize(
    ("name", "status", "body", "words"),
    [
        ("serper", 403, b'{"message": "Unauthorized."}', r"serper refused the key in SERPER_API_KEY \(status 403\)"),
        ("tavily", 401, b'{"detail": {"error": "sk-hunter2 is bad"}}', "tavily refused the key in TAVILY_API_KEY"),
        ("brave", 429, b"{}", r"brave is asked too often \(status 429\)"),
        ("searxng", 403, b"Forbidden", "allow the format `json` in its settings.yml"),
        ("tavily", 500, b"", "tavily answered with status 500"),
        ("serper", 302, b"", "serper answered with status 302"),
        ("brave", 200, b"<html>", r"brave answered in a form that is not its own \(at the start\)"),
        ("serper", 200, b'{"organic": [{"title": "x"}]}', r"not its own \(at organic.0.link\)"),
        ("searxng", 200, b" " * (MOST_BYTES + 1), "searxng answered with more than 5,242,880 bytes"),
    ],
)
async def test_a_providers_failure_is_not_the_callers_and_names_no_key(
    name: Name, status: int, body: bytes, words: str
) -> None:
    with pytest.raises(Unavailable, match=words) as error:
        await answer(name, Fake(body, status), {"query": "lund"})
    assert KEY not in str(error.value)


async def test_a_silent_or_absent_provider_fails_in_time() -> None:
    with pytest.raises(Unavailable, match=r"brave did not answer within 0.3 s|brave cannot be reached"):
        await answer("brave", Fake(b"{}", silent=threading.Event()), {"query": "lund"}, timeout_s=0.3)
    provider = Provider("searxng", address="http://127.0.0.1:9", timeout_s=5, blocklist=Blocklist())
    with anyio.fail_after(20):
        async with provider.open():
            with pytest.raises(Unavailable, match=r"searxng cannot be reached \(ConnectError\)"):
                await provider.search("x", 1)


def test_a_missing_key_or_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BRAVE_API_KEY")
    with pytest.raises(ProviderError, match="--provider brave needs the environment variable BRAVE_API_KEY"):
        Provider("brave", address=None, timeout_s=1, blocklist=Blocklist())
    with pytest.raises(ProviderError, match="--provider searxng needs --provider-url"):
        Provider("searxng", address=None, timeout_s=1, blocklist=Blocklist())


def test_the_command_refuses_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SERPER_API_KEY")
    command = [sys.executable, "-m", "tool_servers.search", "web", "--provider", "serper"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: --provider serper needs the environment variable SERPER_API_KEY\n"
