"""A user's MCP server of fifteen lines plugs into the quick start by config only, and its calls show in the trees."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from learner.hub.batches import split_frames
from learner.hub.journal import Journal
from protocols.codec import decode_tree
from protocols.records import EpisodeTree
from tests.end_to_end.processes import QUICKSTART, ROOT, SHORT, matpo, only_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ALMANAC = '''
from mcp.server import MCPServer

server = MCPServer("almanac")


@server.tool(structured_output=False)
async def search(query: str) -> str:
    """Look something up in the almanac."""
    return f"[1] {query.strip()} Evora ."


server.run()
'''
"""Whoever is asked for, the answer is Evora: the shipped search server never says that of everybody."""


def trees(run: Path) -> list[EpisodeTree]:
    """Every tree of a run's journal."""
    with Journal.open_read_only(run / "journal.sqlite") as journal:
        rows = journal.rows("SELECT sizes, data FROM frames ORDER BY tree_seq")
    return [decode_tree(split_frames(row)) for row in rows]


def answers(tree: EpisodeTree, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """What tools said in a tree, as the model read it."""
    return [
        str(tokenizer.decode(trajectory.tokens[turn.start : turn.stop]))
        for trajectory in tree.trajectories
        for turn in trajectory.turns
        if turn.kind == "tool_result"
    ]


def test_a_server_of_fifteen_lines_plugs_in_by_config_and_its_calls_show_in_the_trees(tmp_path: Path) -> None:
    assert len([line for line in ALMANAC.splitlines() if line.strip()]) <= 15
    server = tmp_path / "almanac.py"
    server.write_text(ALMANAC)
    # In a config file: the table [tools.mcpServers.almanac] instead of the shipped [tools.mcpServers.search].
    plugged_in = f'tools.mcpServers={{almanac={{command="${{PYTHON}}",args=["{server}"],matpo={{bare_names=true}}}}}}'
    listed = matpo("tools", "list", str(QUICKSTART), plugged_in)
    assert listed.returncode == 0, listed.stderr
    assert "almanac" in listed.stdout and "Look something up in the almanac." in listed.stdout

    done = matpo("run", str(QUICKSTART), *SHORT, "run.steps=2", f"run.dir={tmp_path / 'runs'}", plugged_in)
    assert done.returncode == 0, done.stdout + done.stderr
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "quickstart")
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    played = trees(only_run(tmp_path / "runs"))
    # Delegations are spans of the server `agent`; a call nobody can read has no server.
    calls = [span for tree in played for span in tree.tool_spans if span.server not in ("agent", "")]
    assert {(span.server, span.tool) for span in calls} == {("almanac", "search")}
    assert any(span.outcome == "ok" and span.result_bytes > 0 for span in calls)
    read = [answer for tree in played for answer in answers(tree, tokenizer)]
    assert sum("Evora ." in answer for answer in read) == sum(span.outcome == "ok" for span in calls)
