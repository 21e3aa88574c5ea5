"""The chunked head: how much it holds at once, and scores equal to those of whole logits."""

from __future__ import annotations

import pytest
import torch

from learner.trainer import head
from learner.trainer.head import BUFFERS, LEAST_ROWS, MEMORY_SHARE, chunk_rows, score
from learner.trainer.memory import total_bytes
from learner.trainer.model import Policy
from learner.trainer.pack import micro_batch, pack
from learner.trainer.step import accumulate
from matpo.config import Dppo, Learner
from tests.learner.trainer.models import tiny_model
from tests.learner.trainer.test_exactness import CPU, random_rows


@pytest.mark.parametrize("vocabulary", [13, 49_152, 152_000])
def test_a_chunks_logits_take_at_most_their_share_of_memory_and_at_least_half_of_it(vocabulary: int) -> None:
    rows = chunk_rows(vocabulary, CPU)
    share = total_bytes(CPU) / MEMORY_SHARE
    assert rows & (rows - 1) == 0
    assert rows == LEAST_ROWS or share / 2 < BUFFERS * 4 * vocabulary * rows <= share


def test_a_vocabulary_too_large_for_its_share_is_still_scored_some_rows_at_a_time() -> None:
    assert chunk_rows(1 << 40, CPU) == LEAST_ROWS


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_scores_are_those_of_whole_logits_whatever_the_chunk(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy.of(tiny_model("qwen3"), Learner())
    (batch,) = pack(random_rows(9, seed=1), limit_tokens=1000, device=CPU)
    with torch.no_grad():
        hidden_NE = policy.hidden(batch.tokens_N, batch.positions_N, batch.plan)
        whole_TV = (hidden_NE[batch.predictor_K] @ policy.head.weight.T).log_softmax(-1)[batch.scored_T]
    monkeypatch.setattr(head, "chunk_rows", lambda *_: rows)
    scores = score(policy.head, hidden_NE, batch)
    expected_T = whole_TV.gather(1, batch.target_K[batch.scored_T][:, None]).squeeze(1)
    assert torch.allclose(scores.logp_T, expected_T, atol=1e-5)
    assert torch.allclose(scores.entropy_T, -(whole_TV.exp() * whole_TV).sum(-1), atol=1e-5)


def test_nothing_to_score_is_no_error() -> None:
    policy, batch = Policy.of(tiny_model("llama"), Learner()), micro_batch((), CPU)
    assert len(score(policy.head, torch.zeros(1, 16), batch).logp_T) == 0


def test_a_head_with_a_bias_that_alone_is_trained_gets_its_gradient() -> None:
    model = tiny_model("llama", tied=False)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(13))
    model.lm_head.weight.requires_grad_(False)
    policy = Policy.of(model, Learner())
    batches = pack(random_rows(5, seed=2), limit_tokens=1000, device=CPU)
    accumulate(policy, batches, Dppo())
    bias = policy.head.bias
    assert policy.head.weight.grad is None and bias is not None and bias.grad is not None
    # Every token's slopes add up to nothing over the vocabulary: probabilities always sum to one.
    assert bias.grad.abs().max() > 1e-3 and abs(float(bias.grad.sum())) < 1e-5
