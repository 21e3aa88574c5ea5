"""`matpo`: reads the command line and starts the processes that do the work."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import orjson

from matpo.cli.keys import add_keys_commands
from matpo.cli.matrix import print_matrix
from matpo.cli.run import run
from matpo.cli.sim import simulate
from matpo.errors import UserError, run_command
from matpo.load import load_config

DESCRIPTION = "Asynchronous reinforcement learning for LLM agents that plan, delegate and use tools."


def main() -> None:
    """Entry point of the `matpo` command. Exit codes: 0 done, 2 something to fix, 130 interrupted."""
    sys.exit(run_command(lambda: dispatch(sys.argv[1:])))


def dispatch(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    parsed, rest = _parser().parse_known_args(arguments)
    # Overrides after an option arrive in `rest`: argparse fills a list of positionals only once.
    overridden = parsed.command in ("run", "config")
    strays = [word for word in rest if not overridden or word.startswith("-")]
    if strays and parsed.command not in PASSED_ON:
        close = difflib.get_close_matches(strays[0], ("--dry-run", "--resume"), n=1)
        hint = f"did you mean {close[0]!r}? " if close else "settings are written section.key=value; "
        raise UserError(f"unknown argument {strays[0]!r}; {hint}`matpo {parsed.command} --help` lists what there is")
    match parsed.command:
        case "run":
            return run(parsed.config, [*parsed.override, *rest], resume=parsed.resume, dry_run=parsed.dry_run)
        case "config" if parsed.matrix:
            if parsed.config is not None:
                raise UserError(f"--matrix is of all settings and reads no file; leave out {str(parsed.config)!r}")
            return print_matrix()
        case "config" if parsed.config is None:
            raise UserError("`matpo config` needs a file, for example configs/quickstart.toml, or --matrix")
        case "config":
            config = load_config(parsed.config, [*parsed.override, *rest])
            text = orjson.dumps(config.model_dump(mode="json"), option=orjson.OPT_INDENT_2).decode()
            sys.stdout.write(text + "\n")
            return 0
        case "sim":
            return simulate(policies=parsed.policies, seed=parsed.seed)
        case "keys":
            return int(parsed.act(parsed))
        case command:
            # In the place of this process: whoever signals, kills or waits for the one it knows means the other.
            os.execv(sys.executable, [sys.executable, "-m", *PASSED_ON[command], *rest])


PASSED_ON = {
    "doctor": ["learner.doctor"],
    "replay": ["learner.trainer.replay"],
    "eval": ["actors.evaluate"],
    "tools": ["actors.tools"],
}
"""Commands that are programs of their own; their arguments are passed on as they are."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="matpo", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("run", help="train on this machine: learner and actors as child processes")
    command.add_argument("config", type=Path, help="TOML file, for example configs/quickstart.toml")
    command.add_argument("override", nargs="*", default=[], help="section.key=value, as learner.lr=1e-4")
    command.add_argument("--resume", type=Path, metavar="RUN", help="go on in the folder of an earlier run")
    command.add_argument(
        "--dry-run", action="store_true", help="check settings, files, address and tool servers, then stop"
    )

    command = commands.add_parser("config", help="print the resolved settings, or say what is wrong with them")
    command.add_argument("config", type=Path, nargs="?")
    command.add_argument("override", nargs="*", default=[])
    command.add_argument(
        "--matrix", action="store_true", help="which topology, credit scheme and objective go together, and why not"
    )

    command = commands.add_parser("sim", help="bias and noise of every credit scheme's gradient on small exact games")
    command.add_argument("--policies", type=int, default=8, metavar="N", help="random policies to average over")
    command.add_argument("--seed", type=int, default=0)

    add_keys_commands(commands.add_parser("keys", help="make and show the keys of encrypted links"))

    commands.add_parser("doctor", help="who waits on whom, the ledger, the staleness forecast", add_help=False)
    commands.add_parser("replay", help="train again from a run's journal alone", add_help=False)
    commands.add_parser("eval", help="play the evaluation questions without training", add_help=False)
    commands.add_parser(
        "tools", help="list | check | call | bench the tools of the configured MCP servers", add_help=False
    )
    return parser
