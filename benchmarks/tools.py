"""What tools cost: a call through the plane, programs run per second, search latency and build time.

    python -m benchmarks.tools [--quick] [--only plane,code,search]

Each figure stands beside a yardstick measured in the same run, in turns: the plane beside the plain SDK, sandboxed
programs beside bare interpreters, tantivy beside SQLite FTS5 over the same documents and queries. More parts are
functions in `PARTS` that return their figures.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import numpy as np
import orjson
import uvloop
from numpy.random import Generator
from numpy.typing import NDArray
from pydantic import JsonValue

from benchmarks.runs import print_result
from benchmarks.tool_plane import plane
from tool_servers.code.pool import Pool
from tool_servers.code.sandbox import Allowance, choose_sandbox
from tool_servers.search.index import open_index
from tool_servers.search.tools import Presentation, SearchTools

Figures = dict[str, JsonValue]
PROGRAM = "words = 'the quick brown fox'.split()\nsorted(words, key=len)"
INTERPRETER = str(Path(sys.executable).resolve())
WORDS = 50_000
WORDS_PER_DOCUMENT = 100
HITS = 10


def code(quick: bool) -> Figures:
    """`code_exec_per_s`, with as many programs at a time as there are cores, and bare interpreters beside it."""
    rounds, programs = (3, 40) if quick else (7, 150)
    ours, bare = [], []
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for _ in range(rounds):
            ours.append(programs / runner.run(_run_programs(programs)))
            bare.append(programs / runner.run(_run_interpreters(programs)))
    return {
        "code_exec_per_s": round(statistics.median(ours), 1),
        "bare_python_per_s": round(statistics.median(bare), 1),
        "code_tier": choose_sandbox(Allowance()).tier,
        "cores": os.cpu_count(),
    }


async def _run_programs(count: int) -> float:
    cores = os.cpu_count() or 1
    pool = Pool(choose_sandbox(Allowance()), ahead=cores, at_once=2 * cores, wait_s=600)

    async def one() -> None:
        done = await pool.run(PROGRAM, timeout_s=60)
        assert done.value == "['the', 'fox', 'quick', 'brown']", done

    async with pool.open():
        await one()
        began = time.perf_counter()
        async with anyio.create_task_group() as calls:
            for _ in range(count):
                calls.start_soon(one)
        return time.perf_counter() - began


async def _run_interpreters(count: int) -> float:
    at_once = anyio.Semaphore(2 * (os.cpu_count() or 1))
    command = [INTERPRETER, "-I", "-S", "-c", PROGRAM]

    async def one() -> None:
        async with at_once:
            await anyio.run_process(command, stdin=subprocess.DEVNULL)

    began = time.perf_counter()
    async with anyio.create_task_group() as calls:
        for _ in range(count):
            calls.start_soon(one)
    return time.perf_counter() - began


def search(quick: bool) -> Figures:
    """`search_ms` (the tool's whole answer), `search_build_s` and FTS5's, over the same generated documents."""
    documents, queries, rounds = (20_000, 100, 3) if quick else (100_000, 200, 7)
    draw = np.random.default_rng(7)
    vocabulary = np.array([f"w{number:x}" for number in range(WORDS)])
    texts = [" ".join(row) for row in vocabulary[_zipf(draw, (documents, WORDS_PER_DOCUMENT))]]
    # Words as people ask for them: neither the commonest nor unknown.
    asked = [" ".join(row) for row in vocabulary[100 + _zipf(draw, (queries, 4)) % (WORDS - 100)]]
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus.jsonl")
        with corpus.open("wb") as out:
            out.writelines(orjson.dumps({"id": str(n), "text": text}) + b"\n" for n, text in enumerate(texts))
        began = time.perf_counter()
        tools = SearchTools(open_index(corpus, Path(folder, "index"), "en_stem"), Presentation(results=HITS))
        ours_build_s = time.perf_counter() - began
        began = time.perf_counter()
        table = _fts5(corpus, Path(folder, "fts5.db"))
        fts5_build_s = time.perf_counter() - began
        ours, fts5 = [], []
        for _ in range(rounds):
            ours.append(_per_query_ms(lambda query: tools.search(query, HITS, None), asked))
            fts5.append(_per_query_ms(lambda query: _fts5_search(table, query), asked))
        table.close()
    return {
        "search_ms": round(statistics.median(ours), 3),
        "fts5_ms": round(statistics.median(fts5), 3),
        "search_build_s": round(ours_build_s, 2),
        "fts5_build_s": round(fts5_build_s, 2),
        "search_documents": documents,
    }


def _zipf(draw: Generator, shape: tuple[int, int]) -> NDArray[np.int64]:
    """Ranks of words, drawn as words of a language are: the n-th commonest with a chance near 1/n."""
    ranks: NDArray[np.int64] = np.exp(draw.random(shape) * np.log(WORDS)).astype(np.int64) - 1
    return ranks


def _fts5(corpus: Path, file: Path) -> sqlite3.Connection:
    """The same documents in FTS5 with its stemmer, read from the same file."""
    table = sqlite3.connect(file)
    table.execute("CREATE VIRTUAL TABLE documents USING fts5(id UNINDEXED, title, text, tokenize = 'porter unicode61')")
    with corpus.open("rb") as lines:
        rows = ((row["id"], "", row["text"]) for row in map(orjson.loads, lines))
        table.executemany("INSERT INTO documents VALUES (?, ?, ?)", rows)
    table.commit()
    return table


def _fts5_search(table: sqlite3.Connection, query: str) -> str:
    words = " OR ".join(f'"{word}"' for word in query.split())
    found = table.execute("SELECT text FROM documents WHERE documents MATCH ? ORDER BY rank LIMIT ?", (words, HITS))
    return "\n".join(f"[{n}] {text[:500]}" for n, (text,) in enumerate(found, start=1))


def _per_query_ms(answer: Callable[[str], str], queries: list[str]) -> float:
    began = time.perf_counter()
    for query in queries:
        answer(query)
    return (time.perf_counter() - began) / len(queries) * 1e3


PARTS: dict[str, Callable[[bool], Figures]] = {"plane": plane, "code": code, "search": search}


def main() -> None:
    """Measure the chosen parts and print their figures as one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tools", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute: fewer rounds and documents")
    parser.add_argument("--only", default=",".join(PARTS), metavar="PARTS", help="default %(default)s")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := sorted(set(chosen) - set(PARTS)):
        parser.error(f"--only {','.join(unknown)}: the parts are {', '.join(PARTS)}")
    result: Figures = {}
    for name in chosen:
        figures = PARTS[name](options.quick)
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in figures.items()), flush=True)
        result |= figures
    print_result(result)


if __name__ == "__main__":
    main()
