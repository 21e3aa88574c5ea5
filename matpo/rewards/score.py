"""One episode's reward, part by part (arXiv 2510.04678: 0.9 answer + 0.1 format, half planner, half workers)."""

from __future__ import annotations

from collections.abc import Sequence

from matpo.rewards.call_format import format_score
from matpo.rewards.cost import critical_steps, spawned
from matpo.rewards.entry_point import PlayFunction, local_function, play_function, worker_function
from matpo.rewards.performance import Performance, Play
from matpo.rewards.reading import fact_reported, reading
from matpo.rewards_config import Rewards
from protocols.records import Task

PARTS = ("answer", "format", "format_planner", "format_worker", "reading", "steps", "spawned", "total")


class Scorer:
    """The configured reward of a whole episode."""

    def __init__(self, rewards: Rewards) -> None:
        """Raises `UserError` where a user's function cannot be had."""
        self._rewards = rewards
        self._worker = worker_function(rewards.workers) if ":" in rewards.workers else None
        self._local = None if rewards.local is None else local_function(rewards.local)
        self._own: dict[str, PlayFunction] = {
            name: play_function(part.function) for name, part in rewards.parts.items()
        }

    async def earned(self, play: Play, index: int) -> float | None:
        """What the act of a worker earned; None for what is not scored."""
        worker, measure = play.agents[index], self._rewards.workers
        if worker.subtask is None or worker.broken:
            return None
        if self._worker is not None:
            return await self._worker(play.task, worker.subtask, worker.final or "")
        return format_score(worker.calls) if measure == "format" else fact_reported(play, worker)

    async def local(self, task: Task, role: str, message: str | None) -> float | None:
        """What an answer earned by itself; None for what is not scored, as an answer that never came."""
        return None if self._local is None or message is None else await self._local(task, role, message)

    async def __call__(self, play: Play, answer: float | None) -> dict[str, float | None]:
        """Reward parts by name. Only `total` trains the policy, where the workflow scores no acts of its own.

        All are None if the answer could not be scored or infrastructure broke the episode; `total` is None where a part
        that counts is. Deviations from MATPO's code: (1) without workers the format score is the planner's, where there
        it loses half of it, or not, depending on the rest of the batch; (2) `format` punishes blocks that are not
        closed.
        """
        if answer is None or not play.scorable:
            return dict.fromkeys((*PARTS[:-1], *self._own, "total"))
        rewards = self._rewards
        parts = {"answer": answer, **_format(play), "reading": reading(play)}
        parts |= {"steps": float(critical_steps(play)), "spawned": float(spawned(play))}
        for name, function in self._own.items():
            parts[name] = await function(play)
        weights = {
            "answer": rewards.answer_weight,
            "format": 0.0 if rewards.format_only_if_correct and answer <= 0 else rewards.format_weight,
            "steps": rewards.step_weight,
            "spawned": rewards.spawn_weight,
            **{name: part.weight for name, part in rewards.parts.items()},
        }
        return parts | {"total": _total(parts, weights)}


def _format(play: Play) -> dict[str, float | None]:
    """Half for those whom nobody called, half for those who were called."""
    planner = _mean_format([agent for agent in play.agents if agent.subtask is None])
    worker = _mean_format([agent for agent in play.agents if agent.subtask is not None])
    assert planner is not None, "somebody began"
    whole = planner if worker is None else 0.5 * planner + 0.5 * worker
    return {"format": whole, "format_planner": planner, "format_worker": worker}


def _mean_format(agents: Sequence[Performance]) -> float | None:
    return sum(format_score(agent.calls) for agent in agents) / len(agents) if agents else None


def _total(parts: dict[str, float | None], weights: dict[str, float]) -> float | None:
    total = 0.0
    for name, weight in weights.items():
        value = parts[name]
        if weight and value is None:
            return None
        total += weight * (value or 0.0)
    return total
