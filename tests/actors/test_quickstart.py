"""The shipped quick-start config, tokenizer and template give exactly the dialogue the model was warmed up on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import JsonValue
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from actors.episode import play_episode
from matpo.config import Sampling, WorldData
from matpo.datasets.load import world_task
from matpo.datasets.world import questions
from matpo.load import load_config
from tests.actors.fakes import FakeTools, Say, decoded, stage

ROOT = Path(__file__).resolve().parents[2]


def tokenizer() -> PreTrainedTokenizerFast:
    loaded = AutoTokenizer.from_pretrained(ROOT / "models" / "quickstart")
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


async def test_planner_and_worker_read_and_write_the_tokens_of_the_quick_start() -> None:
    config = load_config(ROOT / "configs" / "quickstart.toml")
    assert isinstance(config.data.train, WorldData)
    question = questions(3, 1)[0]
    fact = question.chain[0]
    asked = " ".join(fact.text.split()[:2])
    hits = f"[1] {question.chain[-1].text} x .\n[2] {fact.text} ."

    async def search(arguments: Mapping[str, JsonValue]) -> str:
        assert arguments == {"query": f" {asked} ", "collection": "world-3"}
        return hits

    async def script(prompt: str, sampling: Sampling) -> Say | str:
        turns = prompt.count("<|assistant|>")
        if prompt.startswith("<|system|> plan"):
            call = '<tool_call>{"name": "worker", "arguments": {"subtask": "' + asked + '"}}</tool_call>'
            return call if turns == 1 else "\\boxed{ " + question.answer + " }"
        call = '<tool_call>{"name": "search", "arguments": {"query": "' + asked + '"}}</tool_call>'
        return {1: call, 2: "done"}.get(turns, fact.text)

    words = tokenizer()
    tools = FakeTools({"search": (search, ("query", "collection"))})
    on_stage, engine = stage(config, script, tools=tools, tokenizer=words)
    tree = await play_episode(
        world_task(question), lease_id="l", group_id="g", episode=0, purpose="train", stage=on_stage
    )
    planner, worker = (decoded(words, t.tokens) for t in tree.trajectories)
    assert planner == (
        f"<|system|> plan <|end|> <|user|> {question.text} <|end|> <|assistant|> "
        f'<tool_call>{{"name": "worker", "arguments": {{"subtask": " {asked} "}}}}</tool_call> <|end|> '
        f"<|user|> {fact.text} <|end|> <|assistant|> \\boxed{{ {question.answer} }} <|end|>"
    )
    assert worker == (
        f"<|system|> work <|end|> <|user|> question : {question.text} subtask : {asked} <|end|> <|assistant|> "
        f'<tool_call>{{"name": "search", "arguments": {{"query": " {asked} "}}}}</tool_call> <|end|> '
        f"<|tool|> {' '.join(hits.replace(' x .', ' <|unk|> .').split())} <|end|> <|assistant|> done <|end|> "
        f"<|user|> report <|end|> <|assistant|> {fact.text} <|end|>"
    )
    assert tree.rewards["total"] == 1.0 and tree.rewards["reading"] in (1.0, None)
    assert max(sampling.max_tokens for sampling in engine.samplings) == 10
