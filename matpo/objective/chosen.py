"""The loss of the objective the config names, with the terms it carries."""

from __future__ import annotations

from typing import assert_never

import torch
from torch import Tensor

from matpo.objective.cispo import cispo
from matpo.objective.clip import clip
from matpo.objective.decoupled import decoupled
from matpo.objective.dppo import dppo
from matpo.objective.gspo import gspo
from matpo.objective.icepop import icepop
from matpo.objective.m2po import m2po
from matpo.objective.reinforce import reinforce
from matpo.objective.tis import tis
from matpo.objective.tokens import TokenLoss, Tokens, required
from matpo.objective.topr import topr
from matpo.objective.trajectories import sequence_mask
from matpo.objective_config import (
    Cispo,
    Clip,
    Decoupled,
    Dppo,
    Gspo,
    IcePop,
    M2po,
    Objective,
    Reinforce,
    Tis,
    Topr,
)


def token_loss(objective: Objective, tokens: Tokens) -> TokenLoss:
    """ℓ per token, differentiable in `tokens.logp_T` and `tokens.entropy_T`.

    Raises ValueError if `tokens` lacks what the objective or one of its terms needs (`objective.needs`).
    """
    policy = _policy_loss(objective, tokens)
    loss_T, masked_T = policy.loss_T, policy.masked_T
    if objective.sequence_mask is not None:
        drift_T = required(tokens.drift_T, "the mean log-ratio of each token's trajectory")
        dropped_T = sequence_mask(drift_T, tokens.advantage_T, objective.sequence_mask)
        loss_T, masked_T = torch.where(dropped_T, 0.0, loss_T), masked_T | dropped_T
    if objective.reference_kl:
        reference_T = required(tokens.reference_logp_T, "the log-probabilities of the reference model")
        loss_T = loss_T + objective.reference_kl * reference_kl(tokens.logp_T, reference_T)
    if objective.entropy_bonus:
        loss_T = loss_T - objective.entropy_bonus * required(tokens.entropy_T, "the entropy of the policy")
    return TokenLoss(loss_T, masked_T)


def reference_kl(logp_T: Tensor, reference_logp_T: Tensor) -> Tensor:
    """k3: π_ref/π − 1 − log(π_ref/π), never negative, whose mean over tokens of π is KL(π‖π_ref)
    (http://joschu.net/blog/kl-approx.html)."""
    log_ratio_T = reference_logp_T - logp_T
    return log_ratio_T.exp() - 1 - log_ratio_T


def _policy_loss(objective: Objective, tokens: Tokens) -> TokenLoss:
    match objective:
        case Dppo():
            return dppo(objective, tokens)
        case Clip():
            return clip(objective, tokens)
        case Decoupled():
            return decoupled(objective, tokens)
        case Tis():
            return tis(objective, tokens)
        case IcePop():
            return icepop(objective, tokens)
        case Cispo():
            return cispo(objective, tokens)
        case Gspo():
            return gspo(objective, tokens)
        case Topr():
            return topr(tokens)
        case M2po():
            return m2po(tokens)
        case Reinforce():
            return reinforce(tokens)
        case _:
            assert_never(objective)
