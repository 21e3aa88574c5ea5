"""Settings of the reward: what an answer is worth, what else counts, and with which weight."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from matpo.endpoint_config import Endpoint
from matpo.section import Section

EntryPoint = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
"""`module:function`, importable from the working directory or installed."""
BuiltIn = Literal["exact_match", "f1", "cover", "volunteer", "judge", "code_tests", "collaboration", "tldr", "arxiv"]
SANDBOXED: frozenset[str] = frozenset({"code_tests", "collaboration"})
"""Measures that run generated code, which they do in the sandbox only."""


class Judge(Endpoint):
    """A language model that grades answers."""

    cache_file: Path | None = None
    """Verdicts are kept here and not asked for again, by this run or another; None: only in memory."""


class UserReward(Section):
    """A part of the reward of one's own."""

    function: EntryPoint
    """`(play: matpo.rewards.performance.Play) -> float | None`, async or not; None means not scored."""
    weight: float


class Rewards(Section):
    """`answer_weight · answer + format_weight · format + …`; by default MATPO's (arXiv 2510.04678, code)."""

    answer_weight: float = Field(default=0.9, ge=0)
    format_weight: float = Field(default=0.1, ge=0)
    answer: BuiltIn | EntryPoint = "exact_match"
    """How an answer is measured (docs/rewards.md), or a function of one's own:
    `(task: Task, messages: tuple[str, ...]) -> float | None`, async or not."""
    format_only_if_correct: bool = False
    workers: Literal["none", "format", "fact"] | EntryPoint = "none"
    """What a worker's own act earns, for credit schemes that look at it: its calls' format, whether it reports the fact
    it was asked for (where the task knows them), or a function `(task, subtask, report) -> float | None`."""
    local: EntryPoint | None = None
    """With `learner.credit = "agent_turn"`: what an agent's answer earns by itself, beside the joint answers it is part
    of: a function `(task, role, message) -> float | None`."""
    judge: Judge | None = None
    """With `answer = "judge"`: who judges."""
    code_tool: str = "run_python"
    """With `answer = "code_tests"` or `"collaboration"`: the tool that runs code in a sandbox, by its usual name."""
    code_test_timeout_s: float = Field(default=2.0, gt=0)
    """Of one test; after three that take longer the others fail. The tool's own limit must allow for four."""
    step_weight: float = 0.0
    """Times the turns on the critical path; below 0 for a cost."""
    spawn_weight: float = 0.0
    """Times the number of agents that others called; below 0 for a cost."""
    parts: dict[str, UserReward] = Field(default={})
    """Further parts by name."""

    @model_validator(mode="after")
    def _effective(self) -> Rewards:
        if (self.answer == "judge") != (self.judge is not None):
            raise ValueError('answer = "judge" and the section judge (url, model) need each other')
        if self.answer not in SANDBOXED and (idle := self.changed("code_tool", "code_test_timeout_s")):
            raise ValueError(f"{idle} have no effect with answer = {self.answer!r}; remove them")
        if taken := sorted(set(self.parts) & {"answer", "format", "reading", "steps", "spawned", "total"}):
            raise ValueError(f"parts may not be called {taken}; these parts exist")
        return self
