"""One agent's token sequence while it grows: appended to, never rewritten."""

from __future__ import annotations

from typing import Self

import numpy as np

from actors.engines.engine import Generation
from protocols.records import Floats, Status, StopReason, Tokens, Trajectory, Turn, TurnKind


class PrefixBroken(Exception):
    """A next prompt does not extend the tokens so far; training on it would train on what was never sampled."""


class Conversation:
    """Tokens, who wrote them, and what sampling recorded about them."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.turns: list[Turn] = []
        self._tokens: Tokens = np.empty(256, dtype=np.int32)
        self._length = 0
        self._logprobs: list[Floats] = []
        self._versions: list[Tokens] = []

    def __len__(self) -> int:
        return self._length

    @property
    def tokens(self) -> Tokens:
        """A copy of all tokens: the next prompt."""
        return self._tokens[: self._length].copy()

    @property
    def last_sampled(self) -> Tokens:
        """The tokens of the last turn if it was sampled, else none."""
        if not self.turns or self.turns[-1].kind != "sampled":
            return np.empty(0, dtype=np.int32)
        return self._tokens[self.turns[-1].start : self._length]

    def append(self, kind: TurnKind, tokens: Tokens, *, call_id: str | None = None) -> None:
        """Add a turn the policy did not choose."""
        start = self._extend(tokens)
        self.turns.append(Turn(kind=kind, start=start, stop=self._length, call_id=call_id))

    def append_sampled(self, generation: Generation, stop: StopReason) -> None:
        """Add what the engine sampled, token for token."""
        start = self._extend(generation.tokens)
        self._logprobs.append(generation.logprobs)
        self._versions.append(generation.versions)
        self.turns.append(Turn(kind="sampled", start=start, stop=self._length, stop_reason=stop))

    def extend_to(self, prompt: Tokens, kind: TurnKind, *, call_id: str | None = None) -> None:
        """Grow to a prompt rendered as a whole. Raises `PrefixBroken` unless it begins with all tokens so far."""
        mine = self._tokens[: self._length]
        shared = min(len(prompt), self._length)
        different = np.flatnonzero(prompt[:shared] != mine[:shared])
        if len(prompt) < self._length or len(different):
            at = int(different[0]) if len(different) else len(prompt)
            turn = next(number for number, turn in enumerate(self.turns) if at < turn.stop)
            raise PrefixBroken(
                f"{self.role}: the prompt after turn {len(self.turns) - 1} differs at token {at} (turn {turn},"
                f" {self.turns[turn].kind}) from what was sampled; append messages instead of rendering anew"
            )
        self.append(kind, prompt[self._length :], call_id=call_id)

    def fork(self) -> Conversation:
        """Another conversation, whose prompt is all of this one: what was sampled here is given there."""
        talk = Conversation(self.role)
        talk.append("prompt", self.tokens)
        return talk

    def part(self, start: int, stop: int | None = None) -> Conversation:
        """Another conversation, of the turns from `start` to before `stop` alone, whose prompt is all before them."""
        sampled = sum(turn.kind == "sampled" for turn in self.turns[:start])
        talk = Conversation(self.role)
        talk.append("prompt", self._tokens[: self.turns[start].start])
        for turn in self.turns[start:stop]:
            tokens = self._tokens[turn.start : turn.stop]
            if turn.stop_reason is None:
                talk.append(turn.kind, tokens, call_id=turn.call_id)
            else:
                generation = Generation(tokens, self._logprobs[sampled], self._versions[sampled], turn.stop_reason)
                talk.append_sampled(generation, turn.stop_reason)
                sampled += 1
        return talk

    def trajectory(self, *, parent: tuple[int, int] | None, status: Status) -> Trajectory:
        """The finished record."""
        sampled = np.zeros(self._length, dtype=np.bool_)
        for turn in self.turns:
            if turn.kind == "sampled":
                sampled[turn.start : turn.stop] = True
        return Trajectory(
            role=self.role,
            parent=parent,
            tokens=self.tokens,
            sampled=sampled,
            logprobs=np.concatenate([np.empty(0, dtype=np.float32), *self._logprobs]),
            versions=np.concatenate([np.empty(0, dtype=np.int32), *self._versions]),
            turns=tuple(self.turns),
            status=status,
        )

    @classmethod
    def begin(cls, role: str, prompt: Tokens) -> Self:
        """A conversation that starts with `prompt`."""
        talk = cls(role)
        talk.append("prompt", prompt)
        return talk

    def _extend(self, tokens: Tokens) -> int:
        start, stop = self._length, self._length + len(tokens)
        if stop > len(self._tokens):
            grown = np.empty(max(stop, 2 * len(self._tokens)), dtype=np.int32)
            grown[:start] = self._tokens[:start]
            self._tokens = grown
        self._tokens[start:stop] = tokens
        self._length = stop
        return start
