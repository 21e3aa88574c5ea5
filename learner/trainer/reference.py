"""The model the policy is kept close to: frozen, in memory once, run forward only for objectives that ask for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from learner.trainer.head import score
from learner.trainer.model import Policy
from learner.trainer.pack import MicroBatch
from learner.trainer.ranks import ALONE, Ranks
from learner.trainer.sharding import whole_head
from matpo.config import Config
from matpo.errors import UserError
from matpo.model_files import model_folder

Reference = Callable[[MicroBatch], Tensor]
"""A micro-batch → log-probability of each of its sampled tokens under the reference, float32 of shape T."""


def load_reference(config: Config, policy: Policy, ranks: Ranks = ALONE) -> Reference | None:
    """What the objective's `reference_kl` is measured against; None if it has no such term.

    The base of an adapter is in memory already. Another reference holds its matrices in the compute type, so that an
    unchanged policy is at distance exactly 0 from either.
    """
    objective = config.learner.objective
    if not objective.reference_kl:
        return None
    if policy.adapter is not None and objective.reference is None:
        adapter = policy.adapter

        def base(batch: MicroBatch) -> Tensor:
            with adapter.disabled():
                return log_probabilities(policy, batch)

        return base
    folder = objective.reference or model_folder(config.model)
    frozen = Policy.load(folder, config.learner, frozen=True, ranks=ranks)
    if frozen.vocabulary != policy.vocabulary:
        raise UserError(
            f"learner.objective.reference {str(objective.reference)!r} has {frozen.vocabulary} tokens, the trained"
            f" model {policy.vocabulary}; give a model with the same tokenizer"
        )
    return partial(log_probabilities, frozen)


def log_probabilities(model: Policy, batch: MicroBatch) -> Tensor:
    """log π of each sampled token, without gradient."""
    model.play(batch.adapter)
    with torch.no_grad():
        hidden_NE = model.hidden(batch.tokens_N, batch.positions_N, batch.plan)
    with whole_head(model.head) as head:
        return score(head, hidden_NE, batch).logp_T
