"""What a call of `generate` has sampled so far, over as many requests to the server as it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from actors.engines.engine import Generation
from actors.engines.sglang.answers import UNVERSIONED, Answer, BadAnswer, versions_of
from protocols.records import Floats, StopReason, Tokens

Number = TypeVar("Number", np.int32, np.float32)


class Progress:
    """Tokens that certainly were sampled, each with its log-probability and version."""

    def __init__(self, prompt: Tokens, adapter: str | None = "") -> None:
        self.adapter = adapter
        """What samples, as in `Engine.generate`."""
        self.count = 0
        """Tokens sampled."""
        self.breaks = 0
        """Requests that broke."""
        self.trouble = ""
        """What broke the last one."""
        self._prompt = self._whole = prompt
        self._tokens: list[Tokens] = []
        self._logprobs: list[Floats] = []
        self._versions: list[Tokens] = []

    @property
    def whole(self) -> Tokens:
        """The prompt and what was sampled: where the next request goes on."""
        if len(self._whole) < len(self._prompt) + self.count:
            self._whole = np.concatenate([self._prompt, *self._tokens])
        return self._whole

    def extend(self, tokens: Tokens, logprobs: Floats, versions: Tokens) -> None:
        """Add what a request sampled."""
        self.count += len(tokens)
        self._tokens.append(tokens)
        self._logprobs.append(logprobs)
        self._versions.append(versions)

    def broken(self, trouble: str) -> None:
        """Count a request that broke."""
        self.breaks += 1
        self.trouble = trouble

    def generation(self, stop: StopReason) -> Generation:
        """As the engine's answer."""
        return Generation(
            tokens=_joined(self._tokens, np.int32),
            logprobs=_joined(self._logprobs, np.float32),
            versions=_joined(self._versions, np.int32),
            stop=stop,
        )


class Reply:
    """One request's reply, whole or event by event."""

    def __init__(self, *, sent_with: int, to_the_end: bool = False) -> None:
        """`sent_with`: version of the weights in use when the request was sent. `to_the_end`: all its tokens are
        sampled with them, whatever the server says of its own weights."""
        self._sent_with = sent_with
        self._to_the_end = to_the_end
        self._events: list[Answer] = []

    @property
    def last(self) -> Answer:
        """The newest event. Raises `BadAnswer` before the first."""
        if not self._events:
            raise BadAnswer("the server's reply is empty")
        return self._events[-1]

    @property
    def count(self) -> int:
        """Tokens received."""
        return sum(len(event.tokens) for event in self._events)

    def take(self, event: Answer) -> None:
        """Add an event; one that repeats everything so far replaces what was there."""
        if event.total == len(event.tokens):
            self._events = [event]
        elif event.total == self.count + len(event.tokens):
            self._events.append(event)
        else:
            raise BadAnswer(f"an event ends at token {event.total}, but {self.count} + {len(event.tokens)} were sent")

    def finish(self, progress: Progress) -> None:
        """Add all of a finished reply to `progress`."""
        if self._to_the_end:
            self.salvage(progress)
            return
        last = self.last
        versions = versions_of(last, self.count, before=self._sent_with, after=last.version)
        progress.extend(*self._arrays(self._events), versions)

    def salvage(self, progress: Progress) -> None:
        """Add what is certain of a reply that broke off: events written under the same weights as the one before."""
        sure: list[Answer] = []
        for event in self._events:
            if not self._to_the_end and (event.version != self._sent_with or event.version == UNVERSIONED):
                break
            sure.append(event)
        if sure:
            count = sum(len(event.tokens) for event in sure)
            progress.extend(*self._arrays(sure), np.full(count, self._sent_with, dtype=np.int32))

    @staticmethod
    def _arrays(events: list[Answer]) -> tuple[Tokens, Floats]:
        tokens, logprobs = [event.tokens for event in events], [event.logprobs for event in events]
        return _joined(tokens, np.int32), _joined(logprobs, np.float32)


def _joined(parts: Sequence[NDArray[Number]], kind: type[Number]) -> NDArray[Number]:
    """One array; mostly there is only one already."""
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, dtype=kind), *parts])
