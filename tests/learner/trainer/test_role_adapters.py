"""Roles with adapters of their own, and frozen ones: who is trained by what, and what is published and saved."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError

from learner.trainer import replay
from learner.trainer.checkpoint import Checkpoints
from learner.trainer.intake import prepare
from learner.trainer.model import Policy
from learner.trainer.pack import pack
from learner.trainer.plan import Sample
from learner.trainer.publish import to_weights
from learner.trainer.reference import log_probabilities
from learner.trainer.step import accumulate, make_optimizer, train_step
from matpo.adapters import only, read_adapter
from matpo.config import Config, Dppo, Learner, Lora
from protocols.weights import weights_digest
from tests.learner.trainer.models import tiny_model
from tests.learner.trainer.runs import make_run, run_trainer
from tests.learner.trainer.test_exactness import CPU, random_rows
from tests.learner.trainer.test_loop import digest_of, rebuild
from tests.learner.trainer.test_step import SHAPE, config_with, good_and_bad

SINGLE = Lora(rank=2, alpha=4.0, target_modules=("q_proj", "up_proj"))
OWN = SINGLE.model_copy(update={"roles": {"planner": "shared", "worker": "own"}})


def both() -> Policy:
    """A tiny model with a shared and a worker's adapter that already do something, each another thing."""
    policy = Policy.of(tiny_model("qwen3"), Learner(), OWN, seed=3)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return policy


def alone(policy: Policy, adapter: str) -> Policy:
    """One of the two adapters in a model of its own."""
    single = Policy.of(tiny_model("qwen3"), Learner(), SINGLE)
    with torch.no_grad():
        for name, parameter in single.parameters.items():
            parameter.copy_(policy.parameters[f"{adapter}/{name}" if adapter else name])
    return single


def rows_of(role: str, adapter: str) -> list[Sample]:
    """The role's rows of a step, played by an adapter."""
    return [replace(row, adapter=adapter) for row in random_rows(12, seed=5) if row.role == role]


def test_each_adapter_gets_the_gradient_of_its_own_roles_as_if_it_were_alone() -> None:
    policy = both()
    done = accumulate(
        policy, pack(rows_of("planner", "") + rows_of("worker", "worker"), limit_tokens=60, device=CPU), Dppo()
    )
    expected_loss = 0.0
    for adapter, role in (("", "planner"), ("worker", "worker")):
        single = alone(policy, adapter)
        expected_loss += accumulate(single, pack(rows_of(role, ""), limit_tokens=60, device=CPU), Dppo()).loss
        for name, parameter in single.parameters.items():
            found = policy.parameters[f"{adapter}/{name}" if adapter else name].grad
            assert found is not None and parameter.grad is not None
            assert parameter.grad.abs().max() > 0
            assert torch.allclose(found, parameter.grad, atol=1e-7)
    assert done.loss == pytest.approx(expected_loss, rel=1e-5)


def test_an_adapter_whose_roles_are_not_in_the_batch_stays_as_it_is() -> None:
    policy = both()
    before = {name: p.detach().clone() for name, p in policy.parameters.items()}
    batches = pack(rows_of("worker", "worker"), limit_tokens=60, device=CPU)
    train_step(policy, make_optimizer(policy, Learner(lr=1e-2)), batches, Learner(lr=1e-2), step=1, steps=2)
    moved = {name for name, p in policy.parameters.items() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.startswith("worker/")}


def test_the_same_tokens_have_the_probability_of_whoever_plays() -> None:
    policy = both()
    (plain,) = pack(rows_of("worker", ""), limit_tokens=1000, device=CPU)
    for adapter in ("", "worker"):
        (batch,) = pack(rows_of("worker", adapter), limit_tokens=1000, device=CPU)
        expected = log_probabilities(alone(policy, adapter), plain)
        assert torch.allclose(log_probabilities(policy, batch), expected, atol=1e-6)


def lora_config(**roles: str) -> Config:
    config = config_with()
    lora = Lora.model_validate({**SINGLE.model_dump(), "roles": roles})
    return config.model_copy(update={"model": config.model.model_copy(update={"lora": lora})})


def test_a_frozen_roles_tokens_are_not_trained_and_change_no_other_tokens_weight() -> None:
    both_trained, frozen = (
        prepare(good_and_bad(), lora_config(planner="shared", worker=kind), current=0, shape=SHAPE, device=CPU)
        for kind in ("shared", "frozen")
    )
    assert {sample.role for sample in both_trained.samples} == {"planner", "worker"}
    assert [s.weight for s in frozen.samples] == [s.weight for s in both_trained.samples if s.role == "planner"]
    assert frozen.trained == both_trained.trained


def test_rows_of_intake_name_the_adapter_that_plays_them() -> None:
    taken = prepare(good_and_bad(), lora_config(planner="own", worker="shared"), current=0, shape=SHAPE, device=CPU)
    assert {(sample.role, sample.adapter) for sample in taken.samples} == {("planner", "planner"), ("worker", "")}
    assert [batch.adapter for batch in taken.micro_batches] == ["", "planner"]


@pytest.mark.parametrize(
    ("roles", "words"),
    [
        ({"planner": "frozen", "worker": "frozen"}, "freezes every role"),
        ({"plan-ner": "own"}, "cannot name an adapter"),
    ],
    ids=["all frozen", "name"],
)
def test_roles_that_make_no_sense_are_refused(roles: dict[str, str], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Lora.model_validate({"roles": roles})


def test_several_adapters_cannot_be_merged_into_one_model() -> None:
    with pytest.raises(ValidationError, match="makes one model"):
        Lora.model_validate({"publish": "merged", "roles": {"planner": "own", "worker": "shared"}})


def config_as(lora: dict[str, str], **learner: object) -> Config:
    content = config_with(**learner).model_dump()
    content["model"]["lora"] = {"roles": lora} if lora else None
    return Config.model_validate(content)


def test_settings_that_contradict_who_is_trained_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"names \['planner'\]; name each of \['planner', 'worker'\]"):
        config_as({"planner": "own"})
    with pytest.raises(ValidationError, match="have no effect: model"):
        config_as({"planner": "own", "worker": "frozen"}, role_factors={"worker": 2.0})
    with pytest.raises(ValidationError, match="no role is trained"):
        config_as({}, role_factors={"planner": 0.0, "worker": 0.0})


def test_a_greedy_role_cannot_be_trained_but_may_be_frozen() -> None:
    content = config_with().model_dump()
    content["episode"]["roles"]["worker"]["sampling"]["temperature"] = 0.0
    with pytest.raises(ValidationError, match=r"the roles \['worker'\] are sampled at temperature 0"):
        Config.model_validate(content)
    content["learner"]["role_factors"] = {"worker": 0.0}
    assert Config.model_validate(content).learner.role_factors == {"worker": 0.0}


def test_a_run_trains_publishes_saves_and_replays_every_adapter(tmp_path: Path) -> None:
    lora = {**SINGLE.model_dump(mode="json"), "roles": {"planner": "own", "worker": "own"}}
    folder, config = make_run(tmp_path, model={"lora": lora})
    hub = run_trainer(folder, config)
    last = rebuild(folder.weights, hub.published)[4]
    assert {name.split("/")[0] for name in last} == {"planner", "worker"}
    assert config.model.lora is not None
    checkpoint = folder.checkpoints / "step-000004"
    saved = read_adapter(checkpoint, config.model.lora)
    assert weights_digest(saved) == digest_of(folder.path)
    policy = Policy.of(tiny_model("qwen3"), config.learner, config.model.lora)
    optimizer = make_optimizer(policy, config.learner)
    state = Checkpoints(folder.checkpoints, 2).restore(policy, optimizer)
    assert state is not None and weights_digest(to_weights(policy.parameters, "float32")) == state.weights
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a property under its old name
        theirs = PeftModel.from_pretrained(tiny_model("qwen3"), str(checkpoint / "worker"))
    found = {name.replace(".default.", "."): p for name, p in theirs.named_parameters() if "lora_" in name}
    assert weights_digest(to_weights(found, "float32")) == weights_digest(only(saved, "worker"))
    assert replay.run([str(tmp_path)]) == 0
