"""Made-up planner/worker episodes in the three forms in which agents leave their contexts behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from learner.trainer.plan import Sample

Form = Literal["append_only", "context_edited", "per_turn"]
Piece = tuple[NDArray[np.int32], bool]
"""Tokens, and whether the policy sampled them."""

TEMPERATURE = 1.0
DROP_SHARE = 0.3
"""Turns of the context-edited form after which an old tool result is dropped."""


@dataclass(frozen=True)
class Episodes:
    """G trees of one task: a planner and its workers, lengths in tokens, ranges inclusive."""

    form: Form
    trees: int
    workers: tuple[int, int]
    turns: tuple[int, int]
    system: int
    """Of the planner; a worker's is two thirds of it."""
    question: int = 50
    thought: tuple[int, int] = (20, 60)
    action: tuple[int, int] = (10, 30)
    observation: tuple[int, int] = (30, 90)

    def samples(self, vocabulary: int, seed: int) -> list[Sample]:
        """What the trainer is given for them."""
        rng = np.random.default_rng(seed)
        planner, worker = (rng.integers(0, vocabulary, n, np.int32) for n in (self.system, self.system * 2 // 3))
        question = rng.integers(0, vocabulary, self.question, np.int32)
        return [sample for _ in range(self.trees) for sample in self._tree(rng, vocabulary, planner, worker, question)]

    def _tree(
        self,
        rng: np.random.Generator,
        vocabulary: int,
        planner: NDArray[np.int32],
        worker: NDArray[np.int32],
        question: NDArray[np.int32],
    ) -> Iterator[Sample]:
        asked = np.concatenate([planner, question])
        yield from self._agent(rng, vocabulary, "planner", asked)
        for _ in range(int(rng.integers(*self.workers, endpoint=True))):
            # The recap of the main question, then the worker's own subtask.
            subtask = rng.integers(0, vocabulary, self.question, np.int32)
            yield from self._agent(rng, vocabulary, "worker", np.concatenate([worker, question, subtask]))

    def _agent(
        self, rng: np.random.Generator, vocabulary: int, role: str, start: NDArray[np.int32]
    ) -> Iterator[Sample]:
        context: list[Piece] = [(start, False)]
        for turn in range(int(rng.integers(*self.turns, endpoint=True))):
            thought, action, observation = (
                rng.integers(0, vocabulary, int(rng.integers(*span, endpoint=True)), np.int32)
                for span in (self.thought, self.action, self.observation)
            )
            if self.form == "per_turn":
                # Thoughts are stripped from what the next turn sees, so every turn is a sample of its own.
                yield _sample(rng, role, [*context, (thought, True), (action, True)])
                context += [(action, False), (observation, False)]
                continue
            context += [(thought, True), (action, True), (observation, False)]
            if self.form == "context_edited" and turn > 1 and rng.random() < DROP_SHARE:
                yield _sample(rng, role, context)
                # What was sampled before the edit is trained there; the oldest tool result goes.
                context = [(tokens, False) for tokens, _ in context]
                del context[3]
        if self.form != "per_turn" and any(sampled for _, sampled in context):
            yield _sample(rng, role, context)


def _sample(rng: np.random.Generator, role: str, pieces: list[Piece]) -> Sample:
    sampled = np.concatenate([np.full(len(tokens), flag) for tokens, flag in pieces])
    return Sample(
        role=role,
        tokens=np.concatenate([tokens for tokens, _ in pieces]),
        sampled=sampled,
        behaviour=rng.uniform(-9, -7, int(sampled.sum())).astype(np.float32),
        advantage=float(rng.normal()),
        weight=1e-4,
        temperature=TEMPERATURE,
    )
