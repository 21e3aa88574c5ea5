"""Wrong settings are refused in one line that names the key, the value and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from matpo.errors import UserError
from matpo.load import load_config

GOOD = """
[model]
path = "models/quickstart"
[data.train]
kind = "world"
[data.evaluation]
kind = "jsonl"
path = "questions.jsonl"
[episode.roles.planner]
system = "plan"
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    file = tmp_path / "good.toml"
    file.write_text(GOOD)
    return file


def test_a_small_file_gets_every_default(good: Path) -> None:
    config = load_config(good)
    assert config.learner.trees_per_step == 16 * 8
    assert config.learner.objective.name == "dppo"
    assert config.episode.roles["planner"].max_turns == 20


def test_overrides_are_toml_values_or_plain_words(good: Path) -> None:
    config = load_config(good, ["learner.lr=1e-4", "run.name=try", "learner.objective.name=clip", "run.steps=3"])
    assert (config.learner.lr, config.run.name, config.learner.objective.name, config.run.steps) == (
        1e-4,
        "try",
        "clip",
        3,
    )


def test_a_resolved_config_loads_back_unchanged(good: Path, tmp_path: Path) -> None:
    config = load_config(good, ["learner.objective.name=tis"])
    resolved = tmp_path / "config.json"
    resolved.write_text(config.model_dump_json())
    assert load_config(resolved) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learner.lrr=1", "unknown option learner.lrr = 1; did you mean 'lr'?"),
        ("lerner.lr=1", "unknown option lerner = {'lr': 1}; did you mean 'learner'?"),
        ("actor.engine.thread=2", "unknown option actor.engine.thread = 2; did you mean 'threads'?"),
        ("episode.roles.planner.sistem=x", "did you mean 'system'?"),
        ("rewards.answer=exact", "rewards.answer = 'exact': must be 'exact_match'"),
        ("learner.lr=-1", "learner.lr = -1: must be greater than 0"),
        ("learner.lr=fast", "learner.lr = 'fast': must be a number, such as 0.5"),
        ("learner.credit=magic", "learner.credit.name = 'magic' is unknown; known here: agent_turn, broadcast,"),
        ("learner.weighting=all", "'tree', 'token', 'trajectory' or 'constant'"),
        ("learner.objective.name=ppo", "learner.objective.name = 'ppo' is unknown; known here: cispo, clip,"),
        ("hub.min_group=9", "hub.min_group (9) must be at most learner.group_size (8)"),
        ("episode.root=boss", "episode.root is 'boss', which is not among the roles ['planner']"),
        ('episode.roles.planner.delegates=["w"]', "episode.roles.planner.delegates names ['w']"),
        ("learner.role_factors.worker=0.5", "learner.role_factors names ['worker']"),
        ("learner.group_size=1", "must be greater than or equal to 2"),
        ("tools.mcpServers.s.args=[]", "needs either `command` (stdio) or `url` (HTTP)"),
        ("learner.objective.delta=2", "learner.objective.delta = 2: must be less than or equal to 1"),
        ("data.train={}", "option data.train.kind is missing; known here: jsonl, world"),
        ("no_equals_sign", "is not of the form section.key=value"),
        ("run.steps.x=1", "run.steps"),
    ],
)
def test_a_wrong_option_is_named_with_its_value_and_the_remedy(good: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(good, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            'rewards.judge={url="https://h/v1",model="m",api_key="planted-1"}',
            "rewards.judge.api_key = <hidden>; did you",
        ),
        ('rewards.judge={url="https://me:planted-1@h/v1",model="m"}', "rewards.judge.url = 'https://<hidden>@h/v1'"),
        ('rewards.jugde={model="m",api_key="planted-1"}', "= {'model': 'm', 'api_key': '<hidden>'}; did you"),
        ("hub.heartbeat_s=sk-planted-1-planted", "hub.heartbeat_s = <hidden>"),
        ("hub.key_dir=7", "hub.key_dir = 7"),
    ],
)
def test_an_error_quotes_no_key_that_was_written_where_none_belongs(good: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(good, [override])
    assert message in str(caught.value)
    assert "planted" not in str(caught.value)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ('handover="collective"', 'set actor.engine.handover = "disk"'),
        ('router="http://r"', "not served behind a router"),
        ('swap="abort"', "remove actor.engine.swap"),
    ],
)
def test_what_adapters_do_not_go_with_is_refused(good: Path, engine: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(good, ["actor.count=1", "model.lora.rank=4", f'actor.engine={{kind="sglang", {engine}}}'])


def test_merged_weights_go_with_everything(good: Path) -> None:
    engine = 'actor.engine={kind="sglang", handover="collective", python="p", urls=["http://u"], swap="abort"}'
    config = load_config(good, ["actor.count=1", "model.lora.rank=4", 'model.lora.publish="merged"', engine])
    assert config.model.lora is not None and config.model.served_adapter is None


def test_adapters_target_every_projection_unless_told_otherwise(good: Path) -> None:
    lora = load_config(good, ["model.lora.rank=4"]).model.lora
    assert lora is not None and len(lora.target_modules) == 7
    with pytest.raises(UserError, match="and none twice"):
        load_config(good, ['model.lora.target_modules=["q_proj", "q_proj"]'])


def test_a_sender_without_broadcasts_is_refused(good: Path) -> None:
    with pytest.raises(UserError, match='have no effect with handover = "disk"'):
        load_config(good, ['actor.engine={kind="sglang", sender_address="10.0.0.1"}'])


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(GOOD.replace('[model]\npath = "models/quickstart"', ""))
    with pytest.raises(UserError, match=r"option model is missing; set it"):
        load_config(file)


def test_a_file_that_is_not_toml_is_refused_with_the_place(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text("[model\n")
    with pytest.raises(UserError, match=r"is not TOML: .*line 1"):
        load_config(file)


def test_a_byte_order_mark_is_no_part_of_the_settings(tmp_path: Path) -> None:
    file = tmp_path / "windows.toml"
    file.write_text(GOOD, encoding="utf-8-sig")
    assert load_config(file).model.path == Path("models/quickstart")


def test_a_file_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match=r"config file 'nowhere.toml' does not exist; the shipped ones are in configs/"):
        load_config(Path("nowhere.toml"))
