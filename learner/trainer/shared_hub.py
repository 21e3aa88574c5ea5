"""The hub as all ranks see it: the first rank asks it and publishes, the others hear the answers and follow.

While the first rank waits for a batch, every answer `NotYet` reaches all ranks, and each says whether it was told to
stop: nobody waits unheard, and all leave between the same two steps.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from learner.trainer.consumed import ConsumedLog
from learner.trainer.hub import Hub
from learner.trainer.intake import StepInput
from learner.trainer.publish import Publisher
from learner.trainer.ranks import Ranks
from learner.trainer.sharding import Whole
from matpo.config import Config
from matpo.folder import RunFolder
from protocols.messages import Batch

Frames = list[memoryview]


@dataclass(frozen=True, slots=True)
class SharedHub:
    """What a trainer of any number of ranks says to the hub. Every method is called by all ranks."""

    ranks: Ranks
    stopping: threading.Event
    first: _First | None
    """On the first rank only."""

    @classmethod
    @contextmanager
    def open(cls, folder: RunFolder, config: Config, ranks: Ranks, stopping: threading.Event) -> Iterator[SharedHub]:
        """Find the hub of a run. Raises `NoHub` on the first rank if none listens within a minute."""
        if not ranks.first:
            yield cls(ranks, stopping, None)
            return
        publisher = Publisher(
            folder.weights,
            dtype=config.learner.publish_dtype,
            keyframe_every=config.hub.keyframe_every_steps,
            threads=config.learner.threads,
        )
        with Hub(folder, stopping) as hub, ConsumedLog(folder.consumed) as consumed:
            yield cls(ranks, stopping, _First(hub, publisher, consumed))

    def hello(self, *, step: int, config_digest: str) -> int:
        """Say at which step the trainer is; returns the lineage its versions belong to."""
        lineage = 0
        if self.first is not None:
            lineage = self.first.hub.hello(step=step, config_digest=config_digest)
            self.first.consumed.start(lineage, step)
        return int(self.ranks.most([lineage])[0])

    def batch(self, step: int, *, settled: int) -> tuple[Batch, Frames] | None:
        """Wait for the groups of `step`; None when any rank was told to stop meanwhile.

        `settled`: no checkpoint of an earlier step is kept.
        """
        while True:
            # A rank that was told to stop asks nothing more: the hub may be going too.
            answer = (
                None if self.first is None or self.stopping.is_set() else self.first.hub.poll(step, settled=settled)
            )
            stop, ready = self.ranks.most([self.stopping.is_set(), answer is not None])
            if stop:
                self.stopping.set()  # on every rank: none of them ends as if the run were complete
                return None
            if ready:
                heard = self.ranks.share(None if answer is None else [answer[0].model_dump_json().encode(), *answer[1]])
                return Batch.model_validate_json(bytes(heard[0])), heard[1:]

    def done(self, lineage: int, step: int, taken: StepInput, frames: Frames) -> None:
        """Have the ledger record the step; `frames` are its batch as it came."""
        if self.first is not None:
            self.first.consumed.step(lineage, step, taken, frames)
            self.first.hub.done(lineage, step, taken)

    def publish(self, weights: Mapping[str, Tensor], *, version: int) -> int:
        """Write the objects of `version` and announce them; returns their bytes, 0 on all ranks but the first."""
        whole = Whole(weights)
        if self.first is None:
            whole.help()
            return 0
        message = self.first.publisher.publish(whole, version=version)
        self.first.hub.publish(message)
        return sum(item.size_bytes for item in message.objects)


@dataclass(frozen=True, slots=True)
class _First:
    """What only the first rank has."""

    hub: Hub
    publisher: Publisher
    consumed: ConsumedLog
