"""`matpo-learner`: the hub and the trainer of one run, each started again when it dies, until the run is complete.

Under `accelerate launch` or `torchrun` there is one of it per rank. The first keeps the hub and its own rank of the
trainer, the others become ranks; when one dies, whoever launched them starts all again.

Exit codes: 0 the run is complete, 2 something to fix, 3 the run paused, 130 stopped by SIGTERM or SIGINT before that.
A run that paused ends with 0 under a launcher that would start it again.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import anyio

from learner.supervisor import TRAINER_FROZEN_S, TRAINER_LEAVE_LIMIT_S, Supervisor
from matpo.errors import UserError, run_command
from matpo.folder import RunFolder
from matpo.keeper import MOST_FAILURES, Kept, Patience, always
from matpo.launched import code_for_launcher, launched_ranks, own_rank
from matpo.load import load_config
from matpo.logs import configure_logs
from matpo.owner import Owner, add_owned

LAUNCHED_LEAVE_LIMIT_S = 20.0
"""For a rank to finish its step and save; the launchers kill everything after 30 s."""


def main() -> None:
    """Entry point of the `matpo-learner` command."""
    sys.exit(code_for_launcher(run_command(lambda: run(sys.argv[1:]))))


def run(arguments: Sequence[str]) -> int:
    """Supervise the learner of one run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="matpo-learner", description="Hub and trainer of one run, supervised.")
    parser.add_argument("config", type=Path, nargs="?", help="TOML file; not needed with --run")
    parser.add_argument("override", nargs="*", default=[], help="section.key=value")
    parser.add_argument("--run", type=Path, metavar="RUN", help="start or go on in this run's folder")
    add_owned(parser)
    options = parser.parse_intermixed_args(arguments)
    folder = prepare(options.config, options.override, options.run)
    if own_rank() > 0:
        os.execv(sys.executable, (sys.executable, "-m", "learner.trainer", "--run", str(folder.path)))
    configure_logs(folder.log("learner"), "learner")
    sys.stderr.write(f"run folder {folder.path}\n")
    owner = Owner.at_standard_input(owned=options.owned)
    made = supervisor(folder, owner, ranks=load_config(folder.config).learner.ranks)
    return anyio.run(made.run)


def supervisor(folder: RunFolder, owner: Owner, *, ranks: int) -> Supervisor:
    """Hub and trainer of a run; the trainer has so many `ranks` on this machine, unless they were launched already."""
    logs, place = folder.path / "logs", ("--run", str(folder.path))
    launched = launched_ranks() > 1
    hub = Kept(
        "hub",
        always(sys.executable, "-m", "learner.hub", *place),
        output=logs / "hub.out",
        environment=os.environ,
    )
    trainer = Kept(
        "trainer",
        always(sys.executable, "-m", "learner.trainer" if ranks == 1 or launched else "learner.launch", *place),
        output=logs / "trainer.out",
        environment=os.environ,
        patience=Patience(frozen_s=TRAINER_FROZEN_S, most_failures=1 if launched else MOST_FAILURES),
        outlived_by=[hub],
    )
    limit_s = LAUNCHED_LEAVE_LIMIT_S if launched else TRAINER_LEAVE_LIMIT_S
    return Supervisor(hub=hub, trainer=trainer, owner=owner, launched=launched, trainer_leave_limit_s=limit_s)


def prepare(config: Path | None, overrides: Sequence[str], run: Path | None) -> RunFolder:
    """The run's folder: an existing one keeps its settings, a new one gets those of `config`."""
    if run is not None and (run / "config.json").is_file():
        folder = RunFolder.existing(run)
        if overrides and (config is None or load_config(config, overrides) != load_config(folder.config)):
            raise UserError(
                f"--run {str(run)!r} is an existing run, which keeps the settings it started with; leave the overrides"
                " away, or start a new run"
            )
        if own_rank() == 0:  # the others join the run that the first one started
            folder.require_free()
        return folder
    if config is None:
        raise UserError("give a config file, for example configs/quickstart.toml, or --run with a run's folder")
    settings = load_config(config, overrides)
    if run is None and launched_ranks() > 1:
        raise UserError("give --run with a folder to all ranks, for example --run runs/first: they share one run")
    if run is None:
        return RunFolder.create(settings)
    return RunFolder.at(run, settings)


if __name__ == "__main__":
    main()
