"""Sampling: log-probabilities are those of the distribution that was drawn from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from actors.engines.embedded.sampler import SamplingRows, sample
from matpo.config import Sampling

P = (0.5, 0.3, 0.15, 0.05)
DRAWS = 20_000


def draw(sampling: Sampling, rows: int = DRAWS) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Tokens and log-probabilities of `rows` independent draws from P."""
    settings = SamplingRows.of([sampling] * rows, vocabulary=len(P), device=torch.device("cpu"))
    logits = torch.tensor(P).log().expand(rows, -1) + 3.0
    tokens, logprobs = sample(logits, settings, torch.Generator().manual_seed(0))
    return tokens.numpy(), logprobs.numpy()


def shares(tokens: NDArray[np.int64]) -> list[float]:
    return [float((tokens == token).mean()) for token in range(len(P))]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), P),
        (Sampling(top_k=2), (0.625, 0.375, 0, 0)),  # 0.5/0.8, 0.3/0.8
        (Sampling(top_k=9), P),
        (Sampling(top_p=0.7), (0.625, 0.375, 0, 0)),  # 0.5 alone does not reach 0.7
        (Sampling(top_p=0.1), (1, 0, 0, 0)),
        (Sampling(top_k=3, top_p=0.6), (0.625, 0.375, 0, 0)),  # of 0.95: 0.526 is short of 0.6
        (Sampling(temperature=0.5), tuple(p * p / 0.365 for p in P)),  # 0.25 + 0.09 + 0.0225 + 0.0025
    ],
)
def test_tokens_are_drawn_from_the_filtered_distribution_and_logprobs_are_its_own(
    sampling: Sampling, expected: tuple[float, ...]
) -> None:
    tokens, logprobs = draw(sampling)
    assert shares(tokens) == pytest.approx(list(expected), abs=0.015)
    for token, probability in enumerate(expected):
        drawn = logprobs[tokens == token]
        assert len(drawn) == 0 if probability == 0 else np.allclose(drawn, math.log(probability), atol=1e-6)


def test_greedy_takes_the_likeliest_and_reports_its_unfiltered_logprob_at_temperature_one() -> None:
    tokens, logprobs = draw(Sampling(temperature=0, top_k=1, top_p=0.1), rows=3)
    assert tokens.tolist() == [0, 0, 0]
    assert logprobs == pytest.approx([math.log(0.5)] * 3, abs=1e-6)


def test_rows_with_different_settings_do_not_disturb_each_other() -> None:
    kinds = [Sampling(temperature=0), Sampling(top_k=1), Sampling(temperature=2.0)]
    settings = SamplingRows.of(kinds, vocabulary=len(P), device=torch.device("cpu"))
    logits = torch.tensor(P).log().expand(3, -1)
    tokens, logprobs = sample(logits, settings, torch.Generator().manual_seed(3))
    assert tokens[:2].tolist() == [0, 0]
    roots = [math.sqrt(p) for p in P]
    expected = [math.log(0.5), 0.0, math.log(roots[int(tokens[2])] / sum(roots))]
    assert logprobs.tolist() == pytest.approx(expected, abs=1e-6)


def test_the_same_seed_draws_the_same_tokens() -> None:
    assert draw(Sampling(), rows=50)[0].tolist() == draw(Sampling(), rows=50)[0].tolist()
