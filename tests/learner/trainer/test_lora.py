"""Adapters in training: gradients as peft's own, a base that stays as it is, and what is published and saved."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import JsonValue
from transformers import AutoModelForCausalLM, PreTrainedModel

from learner.trainer import replay
from learner.trainer.checkpoint import Checkpoints
from learner.trainer.lora import Adapter
from learner.trainer.model import Policy, narrow_frozen
from learner.trainer.pack import pack
from learner.trainer.plan import Sample
from learner.trainer.publish import Publisher, to_weights
from learner.trainer.step import accumulate, make_optimizer, train_step
from matpo.adapters import adapter_shapes, merged, read_adapter
from matpo.config import Clip, Dppo, Learner, Lora, Objective
from matpo.errors import UserError
from protocols.records import version_of
from protocols.weights import read_keyframe, weights_digest
from tests.learner.trainer.models import Family, reference_gradient, tiny_model
from tests.learner.trainer.runs import StopAfter, make_run, run_trainer
from tests.learner.trainer.test_exactness import CPU, gradient, random_rows, relative_difference, samples
from tests.learner.trainer.test_loop import digest_of, rebuild

LORA = Lora(rank=3, alpha=5.0, target_modules=("q_proj", "v_proj", "down_proj"))
IN_CONFIG: dict[str, JsonValue] = {"rank": 3, "alpha": 5.0, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def adapted(family: Family = "llama", *, lora: Lora = LORA, learner: Learner | None = None, seed: int = 0) -> Policy:
    """A tiny model whose adapter already does something."""
    policy = Policy.of(tiny_model(family), learner or Learner(), lora, seed=seed)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in policy.parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return policy


def by_peft(family: Family, policy: Policy, lora: Lora = LORA) -> PeftModel:
    """The same model and adapter as peft's own wrapper, with eager attention."""
    wanted = LoraConfig(r=lora.rank, lora_alpha=int(lora.alpha), target_modules=list(lora.target_modules))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a property under its old name
        model = get_peft_model(tiny_model(family), wanted)
    assert isinstance(model, PeftModel)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(policy.parameters[name.replace(".default.", ".")])
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("objective", [Dppo(tau=0.1), Clip()], ids=lambda o: o.name)
@settings(max_examples=12, deadline=None)
@given(rows=samples())
def test_gradients_of_a_and_b_are_those_of_one_by_one_training_with_peft(
    family: Family, objective: Objective, rows: list[Sample]
) -> None:
    policy = adapted(family)
    loss, grads = gradient(policy, rows, objective, limit=20)
    expected_loss, expected = reference_gradient(by_peft(family, policy), rows, objective)
    assert loss == pytest.approx(expected_loss, rel=1e-5, abs=1e-6)  # a sum of terms of both signs
    assert relative_difference(grads, {name.replace(".default.", "."): g for name, g in expected.items()}) < 1e-5


def test_a_step_moves_the_adapter_and_nothing_else() -> None:
    policy = Policy.of(tiny_model("qwen3", tied=False), Learner(), LORA)
    assert policy.adapter is not None
    before = {name: p.detach().clone() for name, p in policy.adapter.base.items()}
    moving = {name: p.detach().clone() for name, p in policy.parameters.items()}
    optimizer = make_optimizer(policy, Learner(lr=1e-2))
    batches = pack(random_rows(8, seed=1), limit_tokens=100, device=CPU)
    for step in (1, 2):  # A moves only once B is not 0 any more
        train_step(policy, optimizer, batches, Learner(lr=1e-2), step=step, steps=2)
    assert {p for group in optimizer.param_groups for p in group["params"]} == set(policy.parameters.values())
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in policy.adapter.base.items())
    assert not any(torch.equal(p, moving[name]) for name, p in policy.parameters.items())


def test_a_frozen_head_gets_no_gradient() -> None:
    policy = adapted(lora=LORA)
    accumulate(policy, pack(random_rows(4, seed=2), limit_tokens=100, device=CPU), Dppo())
    assert policy.head.weight.grad is None
    assert all(p.grad is not None for p in policy.parameters.values())


def test_a_new_adapter_changes_nothing_and_has_the_names_and_shapes_engines_expect() -> None:
    model = tiny_model("llama")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        own = model(tokens).logits
        adapter = Adapter.attach(model, LORA, seed=0)
        assert torch.equal(model(tokens).logits, own)
    assert {name: tuple(p.shape) for name, p in adapter.parameters.items()} == adapter_shapes(shapes, LORA)
    assert {p.dtype for p in adapter.parameters.values()} == {torch.float32}


def test_a_new_adapter_is_a_function_of_the_seed_alone() -> None:
    drawn = []
    for draw, seed in ((0, 7), (1, 7), (2, 8)):
        model = tiny_model("llama")
        torch.manual_seed(draw)
        after = torch.rand(draw + 1)
        torch.manual_seed(draw)
        drawn.append(weights_digest(to_weights(Adapter.attach(model, LORA, seed=seed).parameters, "float32")))
        assert torch.equal(torch.rand(draw + 1), after), "the random state of others is left alone"
    assert drawn[0] == drawn[1] != drawn[2]


def test_projections_the_model_lacks_or_has_in_another_form_are_refused() -> None:
    with pytest.raises(UserError, match=r"names \['gate_proj'\], which the model does not have"):
        model = tiny_model("llama")
        del model.model.layers[0].mlp.gate_proj, model.model.layers[1].mlp.gate_proj
        Adapter.attach(model, Lora(target_modules=("gate_proj",)), seed=0)


def test_a_base_kept_in_bfloat16_gives_the_same_numbers_bit_for_bit() -> None:
    batches = pack(random_rows(6, seed=3), limit_tokens=100, device=CPU)
    learner = Learner(dtype="bfloat16")
    narrow, wide = (adapted("qwen3", learner=learner) for _ in range(2))
    assert wide.adapter is not None and narrow.adapter is not None
    kept = {name: p.dtype for name, p in narrow.adapter.base.items()}
    assert kept["model.layers.0.self_attn.k_proj.weight"] == torch.bfloat16
    assert kept["model.embed_tokens.weight"] == kept["model.norm.weight"] == torch.float32
    narrow_frozen(wide.model, torch.float32)
    with torch.no_grad():  # the weights as they were before they were rounded
        for name, p in tiny_model("qwen3").named_parameters():
            wide.adapter.base[name].copy_(p)
    losses = [accumulate(policy, batches, Dppo()).loss for policy in (narrow, wide)]
    assert losses[0] == losses[1]
    for ours, theirs in zip(narrow.parameters.values(), wide.parameters.values(), strict=True):
        assert ours.grad is not None and theirs.grad is not None and torch.equal(ours.grad, theirs.grad)


def test_without_the_adapter_the_policy_is_its_own_reference() -> None:
    policy, tokens = adapted("llama"), torch.arange(9)[None]
    model = tiny_model("llama")
    policy.model.set_attn_implementation("eager")
    with torch.no_grad():
        assert policy.adapter is not None
        with policy.adapter.disabled():
            assert torch.equal(policy.model(tokens).logits, model(tokens).logits)
        assert not torch.equal(policy.model(tokens).logits, model(tokens).logits)
    assert all(p.requires_grad for p in policy.parameters.values())


def test_merged_weights_are_those_peft_merges_and_those_engines_merge(tmp_path: Path) -> None:
    policy = adapted("qwen3", lora=LORA.model_copy(update={"publish": "merged"}))
    publisher = Publisher(tmp_path, dtype="float32", keyframe_every=9, part_elements=100)
    message = publisher.publish(policy.published, version=0)
    weights = read_keyframe(tmp_path / message.objects[0].name)
    theirs = by_peft("qwen3", policy).merge_and_unload()
    assert message.digest == weights_digest(to_weights(dict(theirs.named_parameters()), "float32"))
    base = to_weights(dict(tiny_model("qwen3").named_parameters()), "float32")
    for name, tensor in merged(base, to_weights(policy.parameters, "float32"), LORA).items():
        np.testing.assert_allclose(tensor.data, weights[name].data, rtol=1e-6, atol=1e-7)


def test_merged_deltas_are_made_of_the_weights_as_they_are_now(tmp_path: Path) -> None:
    policy = adapted(lora=Lora(rank=1, target_modules=("q_proj",), publish="merged"))
    publisher = Publisher(tmp_path, dtype="bfloat16", keyframe_every=9, part_elements=64)
    published = [publisher.publish(policy.published, version=0)]
    for version in (1, 2):
        with torch.no_grad():
            for parameter in policy.parameters.values():
                parameter.add_(1e-3)
        published.append(publisher.publish(policy.published, version=version))
        assert published[-1].digest == weights_digest(to_weights(policy.published, "bfloat16"))
    assert [item.kind for item in published[2].objects] == ["delta", "fold"]
    assert sorted(rebuild(tmp_path, published)) == [0, 1, 2]


@pytest.mark.parametrize("publish", ["adapter", "merged"])
def test_a_run_publishes_what_actors_were_told_to_expect(tmp_path: Path, publish: str) -> None:
    folder, config = make_run(tmp_path, model={"lora": {**IN_CONFIG, "publish": publish}})
    hub = run_trainer(folder, config)
    shapes = {name: tuple(p.shape) for name, p in tiny_model("qwen3").named_parameters()}
    last = rebuild(folder.weights, hub.published)[4]
    expected = adapter_shapes(shapes, LORA) if publish == "adapter" else shapes
    assert {name: tensor.data.shape for name, tensor in last.items()} == expected


def test_a_stopped_and_resumed_run_ends_with_the_adapter_of_an_uninterrupted_one(tmp_path: Path) -> None:
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole, config = make_run(tmp_path / "whole", steps=6, model={"lora": IN_CONFIG})
    run_trainer(whole, config)
    stopped, config = make_run(tmp_path / "stopped", steps=6, model={"lora": IN_CONFIG})
    run_trainer(stopped, config, stopping=StopAfter(5))
    before = Checkpoints(stopped.checkpoints, keep=2).newest()
    assert before is not None and 0 < before.step < 6
    hub = run_trainer(stopped, config)
    assert hub.published[0].version == version_of(lineage=1, step=before.step)
    assert digest_of(stopped.path) == digest_of(whole.path)
    assert replay.run([str(whole.path)]) == 0


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # what peft asks transformers for
def test_a_checkpoint_is_a_folder_of_peft(tmp_path: Path) -> None:
    folder, config = make_run(tmp_path, model={"lora": IN_CONFIG})
    run_trainer(folder, config)
    saved = folder.checkpoints / "step-000004"
    assert weights_digest(read_adapter(saved, LORA)) == digest_of(tmp_path)
    tokens = torch.arange(8)[None]
    base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        plain = base(tokens).logits
        theirs = PeftModel.from_pretrained(base, saved)(tokens).logits
        by_transformers = AutoModelForCausalLM.from_pretrained(saved)(tokens).logits
    assert not torch.allclose(plain, theirs)
    assert torch.equal(theirs, by_transformers)
    again = Policy.load(tmp_path / "model", Learner(), LORA)
    Checkpoints(folder.checkpoints, keep=2).restore(again, make_optimizer(again, Learner()))
    again.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        assert torch.equal(again.model(tokens).logits, theirs)


@pytest.mark.parametrize(
    ("saved", "lora", "message"),
    [
        (IN_CONFIG, {**IN_CONFIG, "rank": 2}, r"\(3, 5\.0, .*model\.lora has \(2, 5\.0, .*make them agree"),
        (IN_CONFIG, {**IN_CONFIG, "target_modules": ["q_proj"]}, r"model\.lora has \(3, 5\.0, \['q_proj'\]\)"),
        (IN_CONFIG, None, "holds an adapter; set model.lora as it was"),
        (None, IN_CONFIG, "holds all weights; remove model.lora"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(
    tmp_path: Path, saved: JsonValue, lora: JsonValue, message: str
) -> None:
    folder, config = make_run(tmp_path, steps=1, model={"lora": saved})
    run_trainer(folder, config)
    chosen = None if lora is None else Lora.model_validate(lora)
    policy = Policy.load(tmp_path / "model", Learner(), chosen)
    with pytest.raises(UserError, match=message):
        Checkpoints(folder.checkpoints, keep=2).restore(policy, make_optimizer(policy, Learner()))


def test_an_untied_head_is_kept_in_the_compute_type_too() -> None:
    policy = Policy.of(tiny_model("llama", tied=False), Learner(dtype="bfloat16"), LORA)
    assert policy.head.weight.dtype == torch.bfloat16
    accumulate(policy, pack(random_rows(3, seed=4), limit_tokens=100, device=CPU), Dppo())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters.values())
