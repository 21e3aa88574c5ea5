"""Optional terms of the objective on whole models: KL to a reference, entropy, and the forward passes they take."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest
import torch
from torch import Tensor

from learner.trainer.model import Policy
from learner.trainer.pack import MicroBatch, pack
from learner.trainer.reference import load_reference
from learner.trainer.step import Fixed, accumulate, make_optimizer, train_step
from matpo.config import Clip, Config, Dppo, Learner, Lora, Objective, Tis
from matpo.errors import UserError
from tests.learner.trainer import test_step
from tests.learner.trainer.models import tiny_model
from tests.learner.trainer.test_exactness import CPU, random_rows, relative_difference

MODEL: Final = "qwen3"


def direct_gradient(policy: Policy, batches: tuple[MicroBatch, ...], objective: Tis, reference: Policy | None) -> dict[
    str, Tensor
]:  # fmt: skip
    """Autograd through whole logits of the same trie: −w·(sg[R]·A·log π + γ·H) + w·β·k3, written out once more."""
    for parameter in policy.parameters.values():
        parameter.grad = None
    for batch in batches:
        scores = []
        for model in (policy, reference or policy):
            hidden_NE = model.hidden(batch.tokens_N, batch.positions_N, batch.plan)
            logits_KV = hidden_NE[batch.predictor_K] @ model.head.weight.T / batch.temperature_K[:, None]
            scores.append(logits_KV.log_softmax(-1))
        logp_TV, fixed_TV = (rows[batch.scored_T] for rows in scores)
        target_T1 = batch.target_K[batch.scored_T][:, None]
        logp_T, fixed_T = (rows.gather(1, target_T1).squeeze(1) for rows in (logp_TV, fixed_TV.detach()))
        entropy_T = -(logp_TV.exp() * logp_TV).sum(-1)
        gap_T = fixed_T - logp_T
        loss_T = -(logp_T.detach() - batch.behaviour_T).exp().clamp(max=2) * batch.advantage_T * logp_T
        loss_T = loss_T + objective.reference_kl * (gap_T.exp() - 1 - gap_T) - objective.entropy_bonus * entropy_T
        torch.autograd.backward((batch.weight_T * loss_T).sum())
    return {name: p.grad.clone() for name, p in policy.parameters.items() if p.grad is not None}


@pytest.mark.parametrize(("kl", "entropy"), [(0.0, 0.3), (0.2, 0.0), (0.5, 0.1)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_terms_have_the_gradient_autograd_gives_through_whole_logits(
    kl: float, entropy: float, temperature: float
) -> None:
    objective = Tis(reference_kl=kl, entropy_bonus=entropy)
    rows = random_rows(10, seed=1)
    for row in rows:
        object.__setattr__(row, "temperature", temperature)
    policy = Policy.of(tiny_model(MODEL, tied=False), Learner())
    other = Policy.of(tiny_model(MODEL, tied=False, seed=1), Learner())
    batches = pack(rows, limit_tokens=60, device=CPU)
    expected = direct_gradient(policy, batches, objective, other)
    reference = [score_whole(other, batch) for batch in batches]
    accumulate(policy, batches, objective, Fixed(reference=reference))
    found = {name: p.grad for name, p in policy.parameters.items() if p.grad is not None}
    assert relative_difference(found, expected) < 1e-5


def score_whole(policy: Policy, batch: MicroBatch) -> Tensor:
    with torch.no_grad():
        hidden_NE = policy.hidden(batch.tokens_N, batch.positions_N, batch.plan)
        logits_KV = hidden_NE[batch.predictor_K] @ policy.head.weight.T / batch.temperature_K[:, None]
        return logits_KV.log_softmax(-1).gather(1, batch.target_K[:, None]).squeeze(1)[batch.scored_T]


def config_of(folder: Path, objective: Objective) -> Config:
    given = test_step.config_with(objective=objective.model_dump())
    return given.model_copy(update={"model": given.model.model_copy(update={"path": folder})})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_the_run_started_from_is_at_distance_zero_until_the_policy_moves(tmp_path: Path, dtype: str) -> None:
    tiny_model(MODEL).save_pretrained(tmp_path)
    objective = Clip(reference_kl=0.1)
    learner = Learner.model_validate({"objective": objective, "dtype": dtype, "lr": 1e-2})
    policy = Policy.load(tmp_path, learner)
    reference = load_reference(config_of(tmp_path, objective).model_copy(update={"learner": learner}), policy)
    optimizer = make_optimizer(policy, learner)
    batches = pack(random_rows(8, seed=2), limit_tokens=80, device=CPU)
    reports = [
        train_step(policy, optimizer, batches, learner, step=step, steps=2, reference=reference) for step in (1, 2)
    ]
    assert reports[0].reference_kl == 0.0
    assert reports[1].reference_kl is not None and reports[1].reference_kl > 1e-4


def test_without_the_term_there_is_no_reference_in_memory_or_in_the_report(tmp_path: Path) -> None:
    tiny_model(MODEL).save_pretrained(tmp_path)
    policy = Policy.load(tmp_path, Learner())
    assert load_reference(config_of(tmp_path, Dppo(entropy_bonus=0.1)), policy) is None
    _, (report,) = test_step.step_once(Learner(), random_rows(4, seed=3))
    assert report.reference_kl is None


def test_an_adapters_reference_is_its_base_without_another_model_in_memory(tmp_path: Path) -> None:
    tiny_model(MODEL).save_pretrained(tmp_path)
    policy = Policy.load(tmp_path, Learner(), Lora(rank=2))
    assert policy.adapter is not None
    with torch.no_grad():
        for parameter in policy.parameters.values():
            parameter.add_(0.1)
    reference = load_reference(config_of(tmp_path, Tis(reference_kl=1.0)), policy)
    assert reference is not None
    (batch,) = pack(random_rows(5, seed=4), limit_tokens=1000, device=CPU)
    expected = score_whole(Policy.load(tmp_path, Learner()), batch)
    assert torch.allclose(reference(batch), expected, atol=1e-5)
    assert not torch.allclose(score_whole(policy, batch), expected, atol=1e-2)


def test_a_reference_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    model = tiny_model(MODEL)
    model.resize_token_embeddings(20)
    model.save_pretrained(tmp_path)
    config = config_of(tmp_path, Tis(reference_kl=1.0, reference=tmp_path))
    with pytest.raises(UserError, match="has 20 tokens, the trained model 13"):
        load_reference(config, Policy.of(tiny_model(MODEL), Learner()))


def test_a_reference_without_a_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="reference has no effect while reference_kl is 0"):
        Tis(reference=Path("somewhere"))
