"""The processes of a run on this machine: started in their own sessions, watched, and ended by their own ids."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio
from anyio.abc import Process

from matpo.config import Config
from matpo.errors import UserError
from matpo.folder import HubAddress, RunFolder

HUB_START_LIMIT_S = 120.0
"""The learner imports torch and opens the journal before its hub listens."""
ACTOR_LEAVE_LIMIT_S = 20.0
RESTART_PAUSE_S = (1.0, 2.0, 4.0, 8.0)
"""Before the first, second, … restart in a row; an actor that dies once more stops the run."""
HEALTHY_S = 60.0
"""An actor that lived so long starts its restarts afresh."""
USER_ERROR = 2


@dataclass(slots=True)
class Children:
    """Starts the learner and the actors of one run and knows which are alive."""

    config: Config
    folder: RunFolder
    alive: dict[str, Process]
    stopping: bool = False

    async def start(self, name: str, arguments: Sequence[str], *, threads: int) -> Process:
        """Start `python -m …` with its output in RUN/logs/NAME.out."""
        output = self.folder.path / "logs" / f"{name}.out"
        output.parent.mkdir(exist_ok=True)
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        with output.open("ab") as sink:
            process = await anyio.open_process(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env=environment,
                start_new_session=True,
            )
        self.alive[name] = process
        return process

    async def learner(self, finished: anyio.Event) -> None:
        """Run the learner to its end; its failure is the run's failure."""
        process = await self.start(
            "learner", ["learner", str(self.folder.config), "--run", str(self.folder.path)], threads=1
        )
        code = await process.wait()
        self.alive.pop("learner", None)
        finished.set()
        if code == USER_ERROR:
            raise UserError(self.last_words("learner"))
        if code != 0 and not self.stopping:
            raise UserError(f"the learner ended with code {code}: {self.last_words('learner')}")

    async def actor(self, number: int, finished: anyio.Event) -> None:
        """Keep one actor alive until the learner is finished."""
        name = f"actor-{number}"
        deaths = 0  # in a row
        while not finished.is_set() and not self.stopping:
            address = await self.hub_address(finished)
            if address is None:
                return
            began = anyio.current_time()
            process = await self.start(name, self._actor_arguments(name, address), threads=self._actor_threads())
            code = await process.wait()
            self.alive.pop(name, None)
            if code == USER_ERROR:
                raise UserError(f"{name} could not go on: {self.last_words(name)}")
            if code == 0 or self.stopping:
                return
            deaths = 1 if anyio.current_time() - began > HEALTHY_S else deaths + 1
            if deaths > len(RESTART_PAUSE_S):
                raise UserError(f"{name} died {deaths} times in a row, last with code {code}: {self.last_words(name)}")
            pause_s = RESTART_PAUSE_S[deaths - 1]
            with anyio.move_on_after(pause_s):
                await finished.wait()

    async def hub_address(self, finished: anyio.Event) -> HubAddress | None:
        """Where the hub listens; None when the learner ended first. Raises `UserError` after two minutes."""
        with anyio.move_on_after(HUB_START_LIMIT_S):
            while not finished.is_set() and not self.stopping:
                address = self.folder.hub_address()
                if address is not None:
                    return address
                await anyio.sleep(0.1)  # another process writes the file; there is nothing here to wait on
            return None
        raise UserError(f"the hub did not listen within {HUB_START_LIMIT_S:g} s: {self.last_words('learner')}")

    async def wait_for_leavers(self) -> None:
        """Give the actors time to leave by themselves, then end what is left."""
        with anyio.move_on_after(ACTOR_LEAVE_LIMIT_S):
            for process in list(self.alive.values()):
                await process.wait()
        self.kill()

    def drain(self) -> None:
        """Ask every child to finish or return what it holds and leave."""
        self.stopping = True
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End every child and what it started, at once."""
        self.stopping = True
        self._signal(signal.SIGKILL)

    def last_words(self, name: str) -> str:
        """The last line a child printed: its one-line error, if it had one to give."""
        output = self.folder.path / "logs" / f"{name}.out"
        lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines() if output.is_file() else []
        return lines[-1].removeprefix("error: ") if lines else f"it printed nothing; see {output.parent}"

    def _signal(self, number: signal.Signals) -> None:
        for process in self.alive.values():
            try:
                if number == signal.SIGKILL:
                    os.killpg(process.pid, number)  # each child leads its own session
                else:
                    process.send_signal(number)
            except ProcessLookupError:
                continue

    def _actor_arguments(self, name: str, address: HubAddress) -> list[str]:
        place = ["--state", str(self.folder.path), "--actor-id", name]
        weights = self.config.actor.weights
        if weights.folder is None and weights.relay is None:  # the learner's files are here: no need to send them
            place.append(f"actor.weights.folder={self.folder.weights.resolve()}")
        return ["actors", str(self.folder.config), "--hub", address.endpoint, *place]

    def _actor_threads(self) -> int:
        return self.config.actor.engine.threads


def shown_path(path: Path) -> str:
    """A path as the user would type it: relative where it is below the working folder."""
    return str(path.relative_to(Path.cwd())) if path.is_absolute() and path.is_relative_to(Path.cwd()) else str(path)
