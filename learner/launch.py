"""`python -m learner.launch --run RUN`: the trainer's ranks on this machine. They live together: the first that fails
ends them all, and whoever keeps this process starts it again.

Exit codes: 0 the last step is taken, 1 a rank died, 2 something to fix, 3 the run paused, 130 stopped by a signal.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import anyio

from learner.supervisor import INTERRUPTED, TRAINER_FROZEN_S
from matpo.errors import PAUSED, USER_ERROR, Paused, UserError, run_command
from matpo.folder import RunFolder
from matpo.keeper import Kept, Patience, always
from matpo.load import load_config
from matpo.logs import configure_logs
from matpo.owner import Owner, add_owned

HERE: Final = "127.0.0.1"
PATIENCE: Final = Patience(frozen_s=TRAINER_FROZEN_S)


@dataclass(slots=True)
class Launch:
    """One life of the ranks."""

    ranks: tuple[Kept, ...]
    owner: Owner
    stopping: anyio.Event = field(default_factory=anyio.Event)
    codes: dict[str, int] = field(default_factory=dict)
    """In the order in which the ranks ended."""

    async def run(self) -> int:
        """Until all ranks have ended. Raises `UserError` in the words of a rank that paused or has something to fix."""
        with ExitStack() as kept:
            for rank in self.ranks:
                kept.enter_context(rank)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._heed_signals, name="signals")
                tasks.start_soon(self.owner.beat_forever, name="beats")
                async with anyio.create_task_group() as living:
                    for rank in self.ranks:
                        living.start_soon(self._live, rank, name=rank.name)
                tasks.cancel_scope.cancel()
        return self._outcome()

    async def _live(self, rank: Kept) -> None:
        code = await rank.once(self.stopping)
        self.codes[rank.name] = code
        if code not in (0, INTERRUPTED):
            for other in self.ranks:
                other.kill()

    def _outcome(self) -> int:
        failed = {name: code for name, code in self.codes.items() if code != 0}
        # Whoever lost another rank fails too: what a user can fix comes first, then what failed first.
        for rank in self.ranks:
            if failed.get(rank.name) == PAUSED:
                raise Paused(rank.last_words())
            if failed.get(rank.name) == USER_ERROR:
                raise UserError(rank.last_words())
        if not failed:
            return 0
        if self.stopping.is_set() or set(failed.values()) == {INTERRUPTED}:
            return INTERRUPTED
        name, code = next((name, code) for name, code in failed.items() if code != INTERRUPTED)
        words = next(rank.last_words() for rank in self.ranks if rank.name == name)
        sys.stderr.write(f"error: {name} ended with code {code}: {words}\n")
        return 1

    async def _heed_signals(self) -> None:
        """The first signal is handed on, a second one ends all ranks at once."""
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                for rank in self.ranks:
                    rank.kill() if self.stopping.is_set() else rank.signal(signal.SIGTERM)
                self.stopping.set()


def ranks_of(folder: RunFolder, count: int) -> tuple[Kept, ...]:
    """The processes of a run's trainer, which meet at a free port of this machine."""
    with socket.socket() as free:
        free.bind((HERE, 0))
        meeting = {"MASTER_ADDR": HERE, "MASTER_PORT": str(free.getsockname()[1])}
    number = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return tuple(
        Kept(
            f"trainer-{rank}",
            always(sys.executable, "-m", "learner.trainer", "--run", str(folder.path)),
            output=folder.path / "logs" / f"trainer-{rank}.out",
            environment=os.environ | meeting | number | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            patience=PATIENCE,
        )
        for rank in range(count)
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="learner.launch", description="The trainer's ranks on this machine.")
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="folder of the run")
    add_owned(parser)
    options = parser.parse_args()
    owner = Owner.at_standard_input(owned=options.owned)
    folder = RunFolder.existing(options.run)
    config = load_config(folder.config)
    configure_logs(folder.log("launch"), "launch")
    return anyio.run(Launch(ranks_of(folder, config.learner.ranks), owner).run)


if __name__ == "__main__":
    sys.exit(run_command(main))
