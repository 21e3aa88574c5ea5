"""The processes of a run on this machine: the learner and its actors, each kept alive until the run is over."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import anyio

from matpo.config import Config
from matpo.errors import UserError
from matpo.folder import HubAddress, RunFolder
from matpo.keeper import Command, Kept

HUB_START_LIMIT_S: Final = 120.0
"""The learner imports torch and opens the journal before its hub listens."""
HUB_LEAVE_LIMIT_S: Final = 120.0
"""A hub and a trainer whose learner was killed finish their step, save and leave."""
ACTOR_PATIENCE_S: Final = 120.0
"""A hub that froze is found and started again meanwhile."""
ACTOR_LEAVE_LIMIT_S: Final = 20.0
AT_ONCE_S: Final = 3.0
LOOK_EVERY_S: Final = 0.1
"""Another process writes and removes the hub's address; there is nothing here to wait on."""


@dataclass(slots=True)
class Children:
    """Used in a `with`, at whose end every child that is left is killed."""

    config: Config
    folder: RunFolder
    leaving: anyio.Event = field(default_factory=anyio.Event)
    """Set once no child is to be started again."""
    interrupted: bool = False
    learner: Kept = field(init=False)
    actors: list[Kept] = field(init=False)
    _all_left: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        self.learner = self._kept("learner", self._learner_command, threads=1)
        threads = self.config.actor.engine.threads
        names = [f"actor-{number}" for number in range(self.config.actor.count)]
        self.actors = [self._kept(name, self._actor_command(name), threads=threads) for name in names]

    def __enter__(self) -> Self:
        for child in (self.learner, *self.actors):
            self._all_left.enter_context(child)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._all_left.close()

    async def keep(self) -> None:
        """Keep all of them alive until the learner is done, and see the actors off."""
        async with anyio.create_task_group() as actors:
            for actor in self.actors:
                actors.start_soon(self._keep_actor, actor, name=actor.name)
            code = await self.learner.keep(self.leaving)
            self.leaving.set()
            if code != 0 and not self.interrupted:
                raise UserError(f"the learner ended with code {code}: {self.learner.last_words()}")
            async with anyio.create_task_group() as leavers:
                for actor in self.actors:
                    leavers.start_soon(self._see_off, actor)

    def drain(self) -> None:
        """Ask every child to finish or return what it holds and leave."""
        self.interrupted = True
        self.leaving.set()
        for child in (self.learner, *self.actors):
            child.signal(signal.SIGTERM)

    async def end_at_once(self) -> None:
        """For children that drain already: the second signal ends each of them at once; then what is left is killed."""
        self.drain()
        with anyio.move_on_after(AT_ONCE_S):
            for child in (self.learner, *self.actors):
                await child.wait()
        for child in (self.learner, *self.actors):
            child.kill()

    async def _keep_actor(self, actor: Kept) -> None:
        """An actor that its hub sent home has work again only with the next hub: that of another learner, or where
        somebody asked the hub alone to end."""
        while not self.leaving.is_set():
            await actor.keep(self.leaving)
            home = self.folder.hub_address()
            while not self.leaving.is_set():
                hub = self.folder.hub_address()
                if hub is not None and hub != home:
                    break
                await anyio.sleep(LOOK_EVERY_S)

    async def _see_off(self, actor: Kept) -> None:
        """The hub has sent the actors home: who does not go by itself is told, then killed."""
        with anyio.move_on_after(ACTOR_LEAVE_LIMIT_S):
            await actor.wait()
        await actor.end(0)

    async def _learner_command(self) -> Sequence[str]:
        """A learner that was killed leaves a hub and a trainer that end by themselves; the next waits for that."""
        with anyio.move_on_after(HUB_LEAVE_LIMIT_S):
            while True:
                if self.folder.hub_address() is None or self.leaving.is_set():
                    break
                await anyio.sleep(LOOK_EVERY_S)
        return sys.executable, "-m", "learner", str(self.folder.config), "--run", str(self.folder.path)

    def _actor_command(self, name: str) -> Command:
        async def command() -> Sequence[str]:
            address = await self._hub_address()
            if address is None:
                return ()
            words = [sys.executable, "-m", "actors", str(self.folder.config), "--hub", address.endpoint]
            words += ["--state", str(self.folder.path), "--actor-id", name, "--patience-s", str(ACTOR_PATIENCE_S)]
            weights = self.config.actor.weights
            if weights.folder is None and weights.relay is None:  # the learner's files are here: no need to send them
                words.append(f"actor.weights.folder={self.folder.weights.resolve()}")
            return words

        return command

    async def _hub_address(self) -> HubAddress | None:
        """Where the hub listens; None when the run ended first. Raises `UserError` after two minutes."""
        with anyio.move_on_after(HUB_START_LIMIT_S):
            while not self.leaving.is_set():
                address = self.folder.hub_address()
                if address is not None:
                    return address
                await anyio.sleep(LOOK_EVERY_S)
            return None
        raise UserError(f"the hub did not listen within {HUB_START_LIMIT_S:g} s: {self.learner.last_words()}")

    def _kept(self, name: str, command: Command, *, threads: int) -> Kept:
        """A child whose output goes to RUN/logs/NAME.out."""
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        return Kept(name, command, output=self.folder.path / "logs" / f"{name}.out", environment=environment)


def shown_path(path: Path) -> str:
    """A path as the user would type it: relative where it is below the working folder."""
    return str(path.relative_to(Path.cwd())) if path.is_absolute() and path.is_relative_to(Path.cwd()) else str(path)
