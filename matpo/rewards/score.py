"""One episode's reward, part by part (arXiv 2510.04678: 0.9 answer + 0.1 format, half planner, half workers)."""

from __future__ import annotations

from matpo.config import Rewards
from matpo.rewards.answer import exact_match, extract_answer, token_f1
from matpo.rewards.call_format import format_score
from matpo.rewards.performance import Play
from matpo.rewards.reading import reading

PARTS = ("answer", "format", "format_planner", "format_worker", "reading", "total")


def score(play: Play, rewards: Rewards) -> dict[str, float | None]:
    """Reward parts by name; all None if infrastructure broke the episode. Only `total` trains the policy.

    `answer` looks at the root's final message alone: a box in a worker's report does not count. Deviations from MATPO's
    code: (1) without workers the format score is the planner's, where there it loses half of it, or not, depending on
    the rest of the batch; (2) `format` punishes blocks that are not closed.
    """
    if not play.scorable:
        return dict.fromkeys(PARTS)
    root, workers = play.agents[0], play.agents[1:]
    measure = exact_match if rewards.answer == "exact_match" else token_f1
    answer = measure(extract_answer(root.final or ""), play.task.answers)
    planner = format_score(root.calls)
    worker = sum(format_score(agent.calls) for agent in workers) / len(workers) if workers else None
    form = planner if worker is None else 0.5 * planner + 0.5 * worker
    counted = 0.0 if rewards.format_only_if_correct and answer <= 0 else form
    return {
        "answer": answer,
        "format": form,
        "format_planner": planner,
        "format_worker": worker,
        "reading": reading(play),
        "total": rewards.answer_weight * answer + rewards.format_weight * counted,
    }
