"""Gradient checkpointing: the same gradients, less memory, and only where it is needed."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from learner.trainer.memory import available_bytes, peak_bytes, reset_peak, total_bytes
from learner.trainer.model import Policy
from learner.trainer.pack import pack
from learner.trainer.recompute import MEMORY_FRACTION, Mode, Recompute, saved_bytes
from learner.trainer.step import accumulate
from matpo.config import Dppo, Learner, Lora
from matpo.errors import UserError
from tests.learner.trainer.models import Family, tiny_model
from tests.learner.trainer.test_exactness import CPU, random_rows
from tests.learner.trainer.test_step import step_once


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    accumulate(policy, pack(random_rows(12, seed=1), limit_tokens=100, device=CPU), Dppo())
    return {name: p.grad.clone() for name, p in policy.parameters.items() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, Lora(rank=2)])
def test_recomputed_layers_give_the_same_gradients_bit_for_bit(family: Family, dtype: str, lora: Lora | None) -> None:
    kept, again = (
        gradients(
            Policy.of(
                tiny_model(family), Learner.model_validate({"dtype": dtype, "gradient_checkpointing": mode}), lora
            )
        )
        for mode in ("never", "always")
    )
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def wide_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 13}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig.from_dict(shape))


def test_recomputed_layers_keep_little_and_are_never_in_training_mode() -> None:
    policy = Policy.of(wide_model(), Learner())
    (batch,) = pack(random_rows(20, seed=2), limit_tokens=1000, device=CPU)

    def saved(recompute: bool) -> int:
        return saved_bytes(
            lambda: policy.hidden(batch.tokens_N, batch.positions_N, batch.plan, recompute=recompute), policy.model
        )

    # Four layers' inputs and the final norm, against some dozens of tensors a layer.
    assert saved(True) < saved(False) / 5
    assert not any(module.training for module in policy.model.modules())


def test_memory_of_a_micro_batch_is_foretold_from_its_distinct_tokens() -> None:
    policy = Policy.of(wide_model(), Learner())
    (batch,) = pack(random_rows(30, seed=3), limit_tokens=10_000, device=CPU)
    found = saved_bytes(lambda: policy.hidden(batch.tokens_N, batch.positions_N, batch.plan), policy.model)
    assert policy.recompute.bytes_per_token * batch.computed.tokens == pytest.approx(found, rel=0.15)


def recompute_with(mode: Mode, bytes_per_token: int) -> Recompute:
    switch = Recompute.of(tiny_model("llama"), mode, CPU)
    switch.bytes_per_token = bytes_per_token
    return switch


def test_only_what_would_not_fit_is_recomputed_when_left_to_itself() -> None:
    fitting = int(MEMORY_FRACTION * available_bytes(CPU))
    assert not recompute_with("auto", fitting // 4000).needed(1000)
    assert recompute_with("auto", fitting // 500).needed(1000)
    assert recompute_with("always", 0).needed(1)
    assert not recompute_with("never", fitting).needed(1000)


def test_a_model_without_layers_to_recompute_is_refused_only_where_that_is_asked_for() -> None:
    plain = torch.nn.Linear(2, 2)
    assert not Recompute.of(plain, "auto", CPU).needed(1 << 60)
    with pytest.raises(UserError, match="Linear has no layers that can be recomputed"):
        Recompute.of(plain, "always", CPU)


def test_the_report_counts_recomputed_micro_batches_and_the_peak_of_memory() -> None:
    _, (kept,) = step_once(Learner(), random_rows(8, seed=5))
    _, (again,) = step_once(Learner(gradient_checkpointing="always"), random_rows(8, seed=5))
    assert (kept.recomputed_micro_batches, again.recomputed_micro_batches) == (0, again.micro_batches)
    assert kept.loss == again.loss
    assert 50 << 20 < kept.peak_bytes < total_bytes(CPU)


def test_peak_memory_is_that_since_the_last_reset() -> None:
    reset_peak(CPU)
    before = peak_bytes(CPU)
    held = torch.ones(64 << 18)  # 64 MiB
    assert peak_bytes(CPU) - before > 50 << 20
    del held
    reset_peak(CPU)
    assert peak_bytes(CPU) < before + (32 << 20)
