"""`python -m tool_servers.search`: search for any MCP client, over a corpus of one's own (BM25) or the web."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tool_servers.search.index import CorpusError, Tokenizer, open_index
from tool_servers.search.providers import PROVIDERS, Provider, ProviderError
from tool_servers.search.tools import Presentation, SearchTools, provider_tool, served_tools
from tool_servers.serving import Service, add_blocklist_option, add_transport_options, blocklist_option, fail, serve


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tool_servers.search", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    serving = commands.add_parser("serve", help="serve the tools `search` and `open` over a corpus")
    serving.add_argument("--corpus", type=Path, help='rows {"id", "text", "title"?, "collection"?}, JSONL or parquet')
    serving.add_argument("--index", type=Path, metavar="DIR", help="keep the index here (default: in memory)")
    serving.add_argument("--tokenizer", choices=("en_stem", "default"), default="en_stem", help="default %(default)s")
    _add_shown(serving)
    add_transport_options(serving)
    training = serving.add_argument_group("training environment", "answers an agent must read to use")
    training.add_argument("--min-results", type=int, metavar="N", help="random number of hits, at least N")
    training.add_argument("--max-results", type=int, metavar="N", help="… and at most N")
    training.add_argument("--shuffle", action="store_true", help="hits in random order")
    training.add_argument(
        "--noise", type=float, default=0.0, metavar="P", help="chance that a slot is another document"
    )
    training.add_argument("--seed", type=int, default=0)
    web = commands.add_parser("web", help="serve the tool `search` over the web; its key comes from the environment")
    web.add_argument("--provider", choices=PROVIDERS, required=True)
    web.add_argument("--provider-url", metavar="URL", help="in place of the provider's own; your instance of SearXNG")
    web.add_argument("--timeout", type=float, default=15.0, metavar="S", help="for an answer (default %(default)g)")
    _add_shown(web)
    add_transport_options(web)
    building = commands.add_parser("index", help="build an index folder from a corpus")
    building.add_argument("corpus", type=Path)
    building.add_argument("--out", type=Path, required=True, metavar="DIR")
    building.add_argument("--tokenizer", choices=("en_stem", "default"), default="en_stem", help="default %(default)s")
    return parser


def _add_shown(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=int, default=5, metavar="K", help="hits when the caller gives no k")
    parser.add_argument("--snippet", type=int, default=500, metavar="CHARACTERS", help="cut longer documents")
    add_blocklist_option(parser)


def _presentation(options: argparse.Namespace) -> Presentation:
    low, high = options.min_results, options.max_results
    if (low is None) != (high is None) or (low is not None and not 1 <= low <= high):
        fail(f"--min-results {low} --max-results {high}: give both, with 1 <= min <= max")
    if not 0 <= options.noise <= 1:
        fail(f"--noise {options.noise}: a probability is from 0 to 1")
    return Presentation(
        results=options.results,
        snippet_characters=options.snippet,
        min_results=low,
        max_results=high,
        shuffle=options.shuffle,
        noise=options.noise,
        seed=options.seed,
    )


def _index(corpus: Path, out: Path, tokenizer: Tokenizer) -> int:
    started = time.monotonic()
    index = open_index(corpus, out, tokenizer, progress=lambda n: _say(f"\r{n:,} documents"))
    seconds = time.monotonic() - started
    _say(f"\r{index.description.documents:,} documents in {seconds:.1f} s -> {out}\n")
    return 0


def _say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _service(options: argparse.Namespace) -> Service:
    """What `serve` and `web` offer. Raises `CorpusError`, `ProviderError`."""
    if not 1 <= options.results <= 50:
        fail(f"--results {options.results}: from 1 to 50")
    blocklist = blocklist_option(options)
    if options.command == "web":
        provider = Provider(
            options.provider, address=options.provider_url, timeout_s=options.timeout, blocklist=blocklist
        )
        tool = provider_tool(provider, results=options.results, snippet_characters=options.snippet)
        return Service("search", f"Web search by {provider.name}.", (tool,), running=provider.open)
    show = _presentation(options)
    index = open_index(options.corpus, options.index, options.tokenizer)
    held = index.description
    instructions = f"BM25 search over {held.documents} documents in {len(held.collections)} collection(s)."
    return Service("search", instructions, served_tools(SearchTools(index, show, blocklist)))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        if options.command == "index":
            return _index(options.corpus, options.out, options.tokenizer)
        service = _service(options)
    except (CorpusError, ProviderError) as error:
        fail(str(error))
    return serve(service, http=options.http, host=options.host)


if __name__ == "__main__":
    sys.exit(main())
