"""`python -m tool_servers.scrape`: read web pages and PDFs for any MCP client, or pages of an offline corpus."""

from __future__ import annotations

import argparse
import ipaddress
import sys
from collections.abc import Sequence
from pathlib import Path

from tool_servers.scrape.addresses import Refused
from tool_servers.scrape.fetch import Fetcher, Policy
from tool_servers.scrape.page import FetchFailed
from tool_servers.scrape.reader import Reader, load_corpus
from tool_servers.serving import (
    Arguments,
    BadCall,
    Reply,
    ServedTool,
    Service,
    add_blocklist_option,
    add_transport_options,
    blocklist_option,
    fail,
    serve,
    text_argument,
    whole_argument,
)

SHOWN_CHARACTERS = 8_000
MOST_CHARACTERS = 50_000


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tool_servers.scrape", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    serving = commands.add_parser("serve", help="serve the tool `scrape`")
    serving.add_argument("--corpus", type=Path, help='offline: JSONL rows {"url", "text" or "html", "title"?}')
    add_blocklist_option(serving)
    serving.add_argument("--max-mb", type=float, default=5.0, help="of a page, decompressed (default %(default)g)")
    serving.add_argument(
        "--timeout", type=float, default=20.0, metavar="S", help="to fetch a page (default %(default)g)"
    )
    serving.add_argument("--extract-timeout", type=float, default=10.0, metavar="S", help="to turn it into text")
    serving.add_argument(
        "--allow-port", type=int, action="append", default=[], metavar="PORT", help="beside 80 and 443"
    )
    serving.add_argument("--allow-network", action="append", default=[], metavar="CIDR",
                         help="fetch from this private network too")  # fmt: skip
    serving.add_argument("--robots", action="store_true", help="heed robots.txt (as matpo-scrape)")
    add_transport_options(serving)
    return parser


def scrape_tool(reader: Reader) -> ServedTool:
    """The tool as MCP clients see it."""

    async def scrape(arguments: Arguments) -> Reply:
        url = text_argument(arguments, "url").strip()
        offset = whole_argument(arguments, "offset", default=0, low=0, high=2**31)
        most = whole_argument(arguments, "max_chars", default=SHOWN_CHARACTERS, low=1, high=MOST_CHARACTERS)
        try:
            article = await reader.read(url)
        except (Refused, FetchFailed) as error:
            raise BadCall(str(error)) from error
        whole = f"# {article.title}\n\n{article.text}" if article.title else article.text
        if offset >= len(whole):
            raise BadCall(f"{url} has {len(whole)} characters; offset {offset} is past its end")
        end = min(len(whole), offset + most)
        notes = (
            [f"characters {offset} to {end} of {len(whole)}; continue with offset {end}"] if end < len(whole) else []
        )
        notes += ["the page was longer than what is fetched"] if article.truncated and end == len(whole) else []
        return Reply(whole[offset:end] + "".join(f"\n[{note}]" for note in notes), meta={"url": article.url})

    return ServedTool(
        name="scrape",
        description="Read a web page or PDF as text, a part at a time.",
        parameters={
            "type": "object",
            "properties": {
                "url": {"type": "string", "description": "http or https address."},
                "offset": {"type": "integer", "minimum": 0, "description": "Character to start from."},
                "max_chars": {"type": "integer", "minimum": 1, "maximum": MOST_CHARACTERS},
            },
            "required": ["url"],
        },
        call=scrape,
    )


def _policy(options: argparse.Namespace) -> Policy:
    try:
        networks = tuple(ipaddress.ip_network(network) for network in options.allow_network)
    except ValueError as error:
        fail(f"--allow-network: {error}; write for example 10.1.0.0/16")
    return Policy(
        max_bytes=int(options.max_mb * 2**20),
        total_s=options.timeout,
        ports=frozenset({80, 443, *options.allow_port}),
        blocklist=blocklist_option(options),
        allowed_networks=networks,
        robots=options.robots,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = _parser().parse_args(argv)
    policy = _policy(options)
    try:
        corpus = {} if options.corpus is None else load_corpus(options.corpus)
    except OSError as error:
        fail(f"corpus {str(options.corpus)!r} cannot be read ({error.strerror}); give --corpus a JSONL file")
    except ValueError as error:
        fail(str(error))
    fetcher = Fetcher(policy) if options.corpus is None else None
    reader = Reader(fetcher, corpus, extract_s=options.extract_timeout)
    where = f"{len(corpus)} pages of an offline corpus" if fetcher is None else "the public web"
    service = Service("scrape", f"Reads pages of {where} as text.", (scrape_tool(reader),), running=reader.open)
    return serve(service, http=options.http, host=options.host)


if __name__ == "__main__":
    sys.exit(main())
