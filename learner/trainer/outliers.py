"""Which tokens of a whole step an objective leaves out, found before its first optimizer step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from learner.trainer.model import Policy
from learner.trainer.pack import MicroBatch
from learner.trainer.ranks import Ranks
from learner.trainer.reference import log_probabilities
from matpo.config import M2po, Objective
from matpo.objective.m2po import second_moment_mask


def kept_tokens(policy: Policy, batches: Sequence[MicroBatch], objective: Objective, ranks: Ranks) -> list[Tensor]:
    """Per micro-batch, bool of shape T: the tokens that stay; nothing for objectives that look at no whole step.

    Costs one forward pass over this rank's micro-batches; the ranks then tell each other their log-ratios.
    """
    if not isinstance(objective, M2po):
        return []
    own = [log_probabilities(policy, batch) - batch.behaviour_T for batch in batches]
    mine = np.concatenate([np.empty(0, np.float32), *(one.cpu().numpy() for one in own)])
    everyones = [
        np.frombuffer(bytes.fromhex(part.decode()), np.float32) for part in ranks.gather(mine.tobytes().hex().encode())
    ]
    kept = second_moment_mask(torch.from_numpy(np.concatenate(everyones)), objective.threshold)
    before = sum(len(part) for part in everyones[: ranks.rank])
    return list(torch.split(kept[before : before + len(mine)].to(policy.device), [len(one) for one in own]))
