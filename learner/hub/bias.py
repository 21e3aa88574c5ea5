"""The journal's side of the length-bias audit: the newest episodes whose tasks are done with."""

from __future__ import annotations

from typing import Final

from learner.hub.journal import Journal, integer, real
from learner.hub.leases import ZERO_VARIANCE
from matpo.length_bias import BiasAudit, Finished, audit

WINDOW_TREES: Final = 2_000
"""Newest trees that are looked at."""
_NEWEST: Final = """
    SELECT trees.state, seconds, sampled_tokens, reward, group_seq, task ->> '$.metadata.hops'
    FROM trees JOIN groups ON groups.seq = group_seq
    WHERE purpose = 'train' AND groups.state IN ('trained', 'filtered') AND groups.reason IS NOT ?
    ORDER BY trees.seq DESC LIMIT ?
"""


def audit_journal(journal: Journal) -> BiasAudit:
    """Compare what was trained with what was played. Groups that `learner.zero_variance` removes are left out: their
    difficulty is why the settings want them gone."""
    rows = journal.rows(_NEWEST, (ZERO_VARIANCE, WINDOW_TREES))
    rewards: dict[int, list[float]] = {}
    for _, _, _, reward, group, _ in rows:
        if reward is not None:
            rewards.setdefault(integer(group), []).append(real(reward))
    means = {group: sum(found) / len(found) for group, found in rewards.items()}
    return audit(
        [
            Finished(
                trained=state == "trained",
                seconds=real(seconds),
                sampled_tokens=integer(tokens),
                reward_of_task=means.get(integer(group)),
                hops=real(hops) if isinstance(hops, int | float) else None,
            )
            for state, seconds, tokens, _, group, hops in rows
        ]
    )
