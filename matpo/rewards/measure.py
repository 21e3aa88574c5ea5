"""How answers are measured: a small function of a task and one or several final messages, named in the config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from matpo.rewards.answer import cover, exact_match, extract_answer, token_f1, volunteer
from matpo.rewards.code import Sandbox, code_tests, collaboration
from matpo.rewards.entry_point import answer_function
from matpo.rewards.judge import Chat, judged
from matpo.rewards.verdict import Verdict
from matpo.rewards.writing import ARXIV, TLDR, writing
from matpo.rewards_config import Rewards
from protocols.records import Task

_TEXT: Final[dict[str, Callable[[str, Sequence[str]], float]]] = {"exact_match": exact_match, "f1": token_f1}


class Measure:
    """The configured measure."""

    def __init__(self, rewards: Rewards, *, chat: Chat | None = None) -> None:
        """`chat` is the judge's. Raises `UserError` where a user's function cannot be had."""
        self._rewards = rewards
        self._chat = chat
        self._own = answer_function(rewards.answer) if ":" in rewards.answer else None

    async def __call__(self, task: Task, messages: tuple[str, ...], sandbox: Sandbox) -> Verdict:
        """What the messages are worth together: one agent's answer, or those of several who answered at once."""
        name, timeout_s = self._rewards.answer, self._rewards.code_test_timeout_s
        if self._own is not None:
            score = await self._own(task, messages)
            return Verdict(score, feedback="" if score is None else f"That scored {score:g}.")
        match name:
            case "judge":
                assert self._chat is not None, "whoever builds the measure of a judge gives it one"
                return await judged(task, messages, self._chat)
            case "code_tests":
                return await code_tests(task, messages, sandbox, timeout_s=timeout_s)
            case "collaboration":
                return await collaboration(task, messages, sandbox, timeout_s=timeout_s)
            case "tldr" | "arxiv":
                return writing(messages, TLDR if name == "tldr" else ARXIV)
            case "cover" | "volunteer":
                together = cover if name == "cover" else volunteer
                return _verdict(together([extract_answer(message) for message in messages], task.answers))
        scores = [_TEXT[name](extract_answer(message), task.answers) for message in messages]
        return _verdict(sum(scores) / len(scores))


def _verdict(score: float) -> Verdict:
    return Verdict(score, passed=score == 1, feedback="That is right." if score == 1 else "That is not right.")
