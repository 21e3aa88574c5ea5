"""The search server: what is found, how it is shown, and how training environments disturb it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from arro3.core import Array, DataType, Table
from arro3.io import write_parquet

from tool_servers.blocklist import Blocklist
from tool_servers.search.index import CorpusError, Index, open_index
from tool_servers.search.tools import Presentation, SearchTools
from tool_servers.serving import BadCall

ROWS = [
    {"id": "a1", "text": "Ada was born in Lund.", "collection": "a"},
    {"id": "a2", "text": "Bo founded Acme.\nAcme makes anvils.", "collection": "a", "title": "Acme"},
    {"id": "a3", "text": "Cy lives in Lund.", "collection": "a"},
    {"id": "b1", "text": "Ada was born in Oslo.", "collection": "b"},
]


def corpus(folder: Path, rows: list[dict[str, str]]) -> Path:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return open_index(corpus(tmp_path, ROWS), None, "en_stem")


def test_hits_come_best_first_one_line_each_from_the_collection_asked_for(index: Index) -> None:
    tools = SearchTools(index, Presentation())
    assert tools.search("Where was Ada born?", 5, "b") == "[1] Ada was born in Oslo."
    first, *rest = tools.search("Ada born Lund", 5, "a").splitlines()
    assert first == "[1] Ada was born in Lund."
    assert rest == ["[2] Cy lives in Lund."]
    assert len(tools.search("Ada", 5, None).splitlines()) == 2


def test_titles_are_shown_line_feeds_are_not_and_word_forms_match(index: Index) -> None:
    assert (
        SearchTools(index, Presentation()).search("founding anvil", 1, None)
        == "[1] Acme: Bo founded Acme. Acme makes anvils."
    )


@pytest.mark.parametrize("query", ['"Ada', "Ada AND (", "born: Ada", "[Ada TO", "Ada*", "+Ada -x ~ ^"])
def test_query_syntax_is_only_words(index: Index, query: str) -> None:
    assert "Ada was born in Lund." in SearchTools(index, Presentation()).search(query, 5, "a")


def test_nothing_found_and_unknown_collections_are_said(index: Index) -> None:
    tools = SearchTools(index, Presentation())
    assert tools.search("zebra", 5, None) == "No results."
    assert tools.search("...", 5, None) == "No results."
    with pytest.raises(BadCall, match="there is no collection 'c'; there are 2: 'a', 'b'"):
        tools.search("Ada", 5, "c")


def test_long_documents_are_cut_and_opened_a_part_at_a_time(tmp_path: Path) -> None:
    text = "".join(f"{n:04d} " for n in range(1_000))
    tools = SearchTools(open_index(corpus(tmp_path, [{"id": "x", "text": text}]), None, "default"), Presentation())
    assert tools.search("0001", 1, None).endswith("… (open 'x' for more)")
    assert tools.open("x", 0) == text[:4_000] + "\n[characters 0 to 4000 of 5000; continue with offset 4000]"
    assert tools.open("x", 4_000) == text[4_000:]
    with pytest.raises(BadCall, match="offset 5000 is past its end"):
        tools.open("x", 5_000)
    with pytest.raises(BadCall, match="there is no document 'y'"):
        tools.open("y", 0)


def test_a_long_document_shows_the_part_that_answers_the_query(tmp_path: Path) -> None:
    rows = [{"id": "x", "title": "T", "text": "filler " * 500 + "Ada met Bo in Lund. " + "filler " * 500}]
    tools = SearchTools(open_index(corpus(tmp_path, rows), None, "en_stem"), Presentation(snippet_characters=60))
    shown = tools.search("who met Bo", 1, None)
    assert "Ada met Bo in Lund." in shown
    assert shown.startswith("[1] T: … ")
    assert shown.endswith("… (open 'x' for more)")
    assert len(shown) < 60 + 40
    only_title = tools.search("T", 1, None)
    assert only_title.startswith("[1] T: filler filler ")


def test_documents_on_the_blocklist_are_neither_found_nor_opened(tmp_path: Path) -> None:
    rows = [{"id": f"https://{site}.example/{n}", "text": f"word {n}"} for site in ("bad", "good") for n in range(20)]
    index = open_index(corpus(tmp_path, rows), None, "default")
    show = Presentation(snippet_characters=5, min_results=4, max_results=4, noise=0.5)
    for shown in (Presentation(snippet_characters=5), show):
        tools = SearchTools(index, shown, Blocklist(frozenset({"bad.example"})))
        lines = tools.search("word", 4, None).splitlines()
        assert len(lines) == 4
        assert all("good.example" in line for line in lines)
    assert tools.open("https://good.example/3", 0) == "word 3"
    with pytest.raises(BadCall, match=r"'https://bad.example/3' is on the blocklist \(bad.example\)"):
        tools.open("https://bad.example/3", 0)


def test_ids_may_be_numbers_and_texts_be_called_contents(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"id": 7, "contents": "Ada"}\n')
    assert SearchTools(open_index(path, None, "default"), Presentation()).open("7", 0) == "Ada"


def parquet(folder: Path, columns: dict[str, Array]) -> Path:
    path = folder / "corpus.parquet"
    write_parquet(Table.from_arrays(list(columns.values()), names=list(columns)), path, compression="zstd(1)")
    return path


def test_a_parquet_corpus_is_read_like_jsonl(tmp_path: Path) -> None:
    path = parquet(
        tmp_path,
        {
            "id": Array([1, 2], DataType.int64()),
            "text": Array(["Ada was born in Lund.", "Bo was born in Oslo."], DataType.utf8()),
            "title": Array([None, "Bo"], DataType.utf8()),
            "embedding": Array([0.5, 0.5], DataType.float64()),
        },
    )
    index = open_index(path, tmp_path / "index", "en_stem")
    tools = SearchTools(index, Presentation())
    assert tools.search("Oslo", 5, None) == "[1] Bo: Bo was born in Oslo."
    assert tools.search("Lund", 5, None) == "[1] Ada was born in Lund."
    assert tools.open("1", 0) == "Ada was born in Lund."


def test_a_parquet_file_that_is_none_or_lacks_a_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"corpus.parquet:1: text: Field required"):
        open_index(parquet(tmp_path, {"id": Array(["1"], DataType.utf8())}), None, "default")
    for content in (b"", b"PAR", b"id,text\n1,x\n", b"PAR1 cut short"):
        (tmp_path / "bad.parquet").write_bytes(content)
        with pytest.raises(CorpusError, match=r"bad.parquet' is not a whole parquet file"):
            open_index(tmp_path / "bad.parquet", None, "default")


def test_without_the_extra_parquet_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path, {"id": Array(["1"], DataType.utf8())})
    monkeypatch.setattr("tool_servers.search.parquet.READABLE", False)
    with pytest.raises(CorpusError, match=r"with the extra `parquet` \(pip install 'matpo\[parquet\]'\)"):
        open_index(path, None, "default")


def disturbed(folder: Path, seed: int) -> SearchTools:
    rows = [{"id": f"{c}{n}", "text": f"doc {c}{n} word{n % 10}", "collection": c} for c in "pq" for n in range(100)]
    show = Presentation(min_results=3, max_results=6, shuffle=True, noise=0.15, seed=seed)
    return SearchTools(open_index(corpus(folder, rows), None, "default"), show)


def test_slots_are_random_in_number_order_and_worth_as_configured(tmp_path: Path) -> None:
    tools = disturbed(tmp_path, seed=7)
    sizes, places, relevant, shown = Counter[int](), Counter[int](), 0, 0
    for _ in range(2_000):
        # Ten documents of the collection hold word3, one of them is p3: every slot starts out relevant.
        lines = tools.search("word3 p3", 1, "p").splitlines()
        sizes[len(lines)] += 1
        assert len({line.split("] ")[1] for line in lines}) == len(lines)
        assert all(" p" in line for line in lines)
        relevant += sum(line.endswith("word3") for line in lines)
        shown += len(lines)
        places.update(place for place, line in enumerate(lines) if "doc p3 " in line and len(lines) == 4)
    assert sorted(sizes) == [3, 4, 5, 6]
    assert all(abs(count / 2_000 - 0.25) < 0.04 for count in sizes.values())
    # A slot is replaced with probability 0.15, and then nearly always by a document without the word.
    assert 1 - relevant / shown == pytest.approx(0.15, abs=0.02)
    # The best hit stands in each of four places equally often.
    assert all(abs(places[place] / places.total() - 0.25) < 0.08 for place in range(4))


def test_slots_the_search_cannot_fill_are_filled_with_distractors(tmp_path: Path) -> None:
    tools = disturbed(tmp_path, seed=1)
    assert {len(tools.search("p3", 1, "p").splitlines()) for _ in range(100)} == {3, 4, 5, 6}
    assert {len(tools.search("nosuchword", 1, "p").splitlines()) for _ in range(100)} == {3, 4, 5, 6}


def test_the_same_seed_gives_the_same_answers_and_another_one_others(tmp_path: Path) -> None:
    first, same, other = (
        [tools.search("word3", 1, "p") for _ in range(20)]
        for tools in (disturbed(tmp_path, 1), disturbed(tmp_path, 1), disturbed(tmp_path, 2))
    )
    assert first == same
    assert first != other


def test_an_index_folder_is_reused_until_its_corpus_changes(tmp_path: Path) -> None:
    path, folder = corpus(tmp_path, ROWS), tmp_path / "index"
    open_index(path, folder, "en_stem")
    stamp = (folder / "matpo-search.json").stat().st_mtime_ns
    assert open_index(path, folder, "en_stem").description.documents == 4
    assert (folder / "matpo-search.json").stat().st_mtime_ns == stamp
    assert open_index(None, folder, "en_stem").search("Oslo", 1) != []
    corpus(tmp_path, ROWS[:2])
    assert open_index(path, folder, "en_stem").description.documents == 2


def test_a_folder_with_other_files_is_not_touched(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"is not empty \(it holds 'corpus.jsonl'\)"):
        open_index(corpus(tmp_path, ROWS), tmp_path, "en_stem")


def test_a_bad_row_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"id": "1", "text": "x"}\n\n{"id": "2"}\n')
    with pytest.raises(CorpusError, match=r"bad\.jsonl:3: text: Field required"):
        open_index(path, None, "default")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--corpus", "/no/corpus"], "corpus '/no/corpus' does not exist"),
        ([], "give --corpus FILE.jsonl or --index DIR"),
        (["--corpus", "x", "--min-results", "4", "--max-results", "3"], "--min-results 4 --max-results 3"),
        (["--corpus", "x", "--noise", "1.5"], "--noise 1.5: a probability"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(options: list[str], words: str) -> None:
    command = [sys.executable, "-m", "tool_servers.search", "serve", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
