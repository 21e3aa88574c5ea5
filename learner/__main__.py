"""`matpo-learner`: the hub and the trainer of one run, each started again when it dies, until the run is complete.

Exit codes: 0 the run is complete, 2 something to fix, 130 stopped by SIGTERM or SIGINT before that.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import anyio

from learner.supervisor import Supervisor
from matpo.errors import UserError, run_command
from matpo.folder import RunFolder
from matpo.keeper import Kept, Patience, always
from matpo.load import load_config
from matpo.logs import configure_logs
from matpo.owner import Owner, add_owned

TRAINER_PATIENCE = Patience(frozen_s=120.0)
"""A trainer is silent only while no thread of it runs; loading a large model may stop them for a while."""


def main() -> None:
    """Entry point of the `matpo-learner` command."""
    sys.exit(run_command(lambda: run(sys.argv[1:])))


def run(arguments: Sequence[str]) -> int:
    """Supervise the learner of one run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="matpo-learner", description="Hub and trainer of one run, supervised.")
    parser.add_argument("config", type=Path, nargs="?", help="TOML file; not needed with --run")
    parser.add_argument("override", nargs="*", help="section.key=value")
    parser.add_argument("--run", type=Path, metavar="RUN", help="start or go on in this run's folder")
    add_owned(parser)
    options = parser.parse_intermixed_args(arguments)
    folder = prepare(options.config, options.override, options.run)
    configure_logs(folder.log("learner"), "learner")
    sys.stderr.write(f"run folder {folder.path}\n")
    owner = Owner.at_standard_input(owned=options.owned)
    return anyio.run(supervisor(folder, owner).run)


def supervisor(folder: RunFolder, owner: Owner) -> Supervisor:
    """Hub and trainer of a run."""
    logs, place = folder.path / "logs", ("--run", str(folder.path))
    hub = Kept(
        "hub",
        always(sys.executable, "-m", "learner.hub", *place),
        output=logs / "hub.out",
        environment=os.environ,
    )
    trainer = Kept(
        "trainer",
        always(sys.executable, "-m", "learner.trainer", *place),
        output=logs / "trainer.out",
        environment=os.environ,
        patience=TRAINER_PATIENCE,
        outlived_by=[hub],
    )
    return Supervisor(hub=hub, trainer=trainer, owner=owner)


def prepare(config: Path | None, overrides: Sequence[str], run: Path | None) -> RunFolder:
    """The run's folder: an existing one keeps its settings, a new one gets those of `config`."""
    if run is not None and (run / "config.json").is_file():
        if overrides:
            raise UserError("--run of an existing run takes no overrides: a run keeps the settings it started with")
        folder = RunFolder.existing(run)
        folder.require_free()
        return folder
    if config is None:
        raise UserError("give a config file, for example configs/quickstart.toml, or --run with a run's folder")
    settings = load_config(config, overrides)
    if run is None:
        return RunFolder.create(settings)
    folder = RunFolder(run)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write_config(settings)
    return folder


if __name__ == "__main__":
    main()
