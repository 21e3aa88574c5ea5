"""The policy gradient as if the current policy had sampled: nothing corrects for staleness."""

from __future__ import annotations

import torch

from matpo.objective.tokens import TokenLoss, Tokens, policy_gradient


def reinforce(tokens: Tokens) -> TokenLoss:
    """−A·log π (Williams 1992). With one optimizer step per batch this is also PPO without recorded probabilities."""
    return policy_gradient(
        tokens, torch.ones_like(tokens.behaviour_T), torch.zeros_like(tokens.behaviour_T, dtype=torch.bool)
    )
