"""Every row of docs/recipes.md plays and takes a step: its own prompts, workflow, tools, rewards, credit and objective,
with a script for a language model and a random network to train."""

from __future__ import annotations

import math
import random
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import anyio
import orjson
import pytest
from pydantic import JsonValue
from transformers import Qwen3Config, Qwen3ForCausalLM

from actors.calls import Offer
from actors.elsewhere import ChatClient, Elsewhere, JudgeClient
from actors.episode import play_episode
from actors.render import Message
from actors.scene import Stage
from actors.setting import open_tools
from learner.trainer.__main__ import shared_step
from learner.trainer.intake import prepare
from learner.trainer.ranks import ALONE
from learner.trainer.setup import Training
from matpo.config import Config, JsonlData, Sampling
from matpo.datasets.load import load_tasks
from matpo.load import load_config
from matpo.rewards_config import SANDBOXED
from protocols.codec import decode_tree, encode_tree
from protocols.records import EpisodeTree, Task
from tests.actors.fakes import Script, ScriptedEngine, byte_tokenizer
from tests.test_recipes import ROOT, ROWS
from tests.tool_servers.test_providers import ANSWERS, Fake

RUN_AS_SHIPPED = "configs/magrpo_volunteer.toml"
"""Its model and its data are here, and its limits are for its own tokenizer: see docs/results/learning_matrix.md."""
COMMANDS = {row[0].strip("| "): shlex.split(row[-1].strip("` |")) for row in ROWS if RUN_AS_SHIPPED not in row[-1]}
ROW: dict[str, JsonValue] = {
    "question": "Write a function f() that returns 42.",
    "answers": ["def f():\n    return 42"],
    "metadata": {"entry_point": "f", "tests": ["assert f() == 42"], "hidden": "It returns 42."},
}
"""Stands in for data that is not shipped; every kind of reward can score an answer to it."""
HERE = ("learner.device=cpu", "learner.dtype=float32", "actor.engine.kind=embedded", "learner.groups_per_step=1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that reads bytes."""
    folder, tokenizer = tmp_path_factory.mktemp("model"), byte_tokenizer()
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    sizes = {"intermediate_size": 16, "vocab_size": len(tokenizer), "max_position_embeddings": 65_536}
    Qwen3ForCausalLM(Qwen3Config.from_dict({**shape, **sizes, "initializer_range": 0.3})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Somewhere(ChatClient):
    """A model elsewhere, role or judge."""

    def __init__(self) -> None:
        self.asked = 0

    async def complete(self, messages: Sequence[Message], sampling: Sampling) -> str:
        self.asked += 1
        return "A" if self.asked % 2 else "B"


def agent(config: Config, task: Task, offers: Callable[[str], Mapping[str, Offer]]) -> Script:
    """Roles that may call or ask somebody do so in their first message, mostly; answers are right half the time."""
    times = Counter[str]()

    async def script(prompt: str, sampling: Sampling) -> str:
        times[prompt] += 1
        rng = random.Random(f"{prompt}{times[prompt]}")
        role = next(name for name in config.episode.roles if head(config, name) in prompt)
        may = list(offers(role).values())
        if prompt.count("<|im_start|>assistant") == 1 and rng.random() < 0.7:
            if may:
                return call(rng.choice(may), config.episode.call_format)
            if config.episode.workflow.kind == "simulated_user":
                return "What is it to return?"
        right = rng.random() < 0.5
        if config.rewards.answer in SANDBOXED:
            return f"```python\n{task.answers[0] if right else 'def f(): return 41'}\n```"
        return f"\\boxed{{{task.answers[0]}}}" if right else "no idea"

    return script


def head(config: Config, role: str) -> str:
    """What only this role's prompts begin with."""
    return config.episode.roles[role].system.partition("{tools}")[0].strip()


def call(offer: Offer, form: str) -> str:
    needed = offer.parameters.get("required")
    assert isinstance(needed, list)
    arguments = orjson.dumps({str(name): "http://127.0.0.1:1/a" for name in needed}).decode()
    if form == "json":
        return f'<tool_call>{{"name": "{offer.name}", "arguments": {arguments}}}</tool_call>'
    inner = {"server_name": offer.server, "tool_name": offer.name, "arguments": arguments}
    return f"<use_mcp_tool>{''.join(f'<{tag}>{text}</{tag}>' for tag, text in inner.items())}</use_mcp_tool>"


@pytest.fixture
def config(recipe: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    """The recipe's, with what is here in place of models, data that is not shipped, GPUs and the web's search."""
    monkeypatch.setenv("SERPER_API_KEY", "none")
    file, *overrides = COMMANDS[recipe]
    row = tmp_path / "row.jsonl"
    row.write_bytes(orjson.dumps(ROW))
    config = load_config(ROOT / file, overrides)
    datasets = {"train": config.data.train, "evaluation": config.data.evaluation}
    missing = [name for name, data in datasets.items() if isinstance(data, JsonlData) and not data.path.exists()]
    here = [*HERE, f"model.path={model}", *(f"data.{name}.path={row}" for name in missing)]
    with Fake(orjson.dumps(ANSWERS["serper"])).serve() as address:
        if web := config.tools.mcpServers.get("web"):
            here.append(f"tools.mcpServers.web.args={[*web.args, '--provider-url', address]}")
        yield load_config(ROOT / file, [*overrides, *here])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", COMMANDS)
async def test_a_recipe_plays_and_its_policy_moves(config: Config, tmp_path: Path) -> None:
    task = load_tasks(config.data.train, seed=0)[0]
    roles = {name: Somewhere() for name, role in config.episode.roles.items() if role.endpoint is not None}
    judge = JudgeClient(Somewhere(), name="judge", file=None) if config.rewards.judge is not None else None
    stages: list[Stage] = []
    script = agent(config, task, lambda role: stages[0].part(role, hidden=frozenset(), purpose="train").offers)
    with anyio.fail_after(120):
        async with open_tools(config, tmp_path) as tools:
            engine = ScriptedEngine(byte_tokenizer(), script)
            elsewhere = Elsewhere(judge, roles)
            stages.append(Stage.open(config, engine=engine, tools=tools, actor_id="actor", elsewhere=elsewhere))

            async def episode(number: int) -> EpisodeTree:
                tree = await play_episode(
                    task, lease_id="l", group_id="g", episode=number, purpose="train", stage=stages[0]
                )
                return decode_tree(encode_tree(tree))

            trees = [await episode(number) for number in range(4)]
    assert all(tree.reward is not None for tree in trees), [tree.rewards for tree in trees]
    assert {played.role for tree in trees for played in tree.trajectories} == set(config.episode.roles)
    training = Training.start(config, ALONE)
    before = {name: tensor.clone() for name, tensor in training.policy.published.items()}
    taken = prepare(trees, config, current=0, shape=training.policy.shape, device=training.policy.device)
    report = shared_step(training, taken, config, 1, ALONE)
    assert math.isfinite(report.loss) and 0 < report.grad_norm < math.inf
    assert any(not tensor.equal(before[name]) for name, tensor in training.policy.published.items())
