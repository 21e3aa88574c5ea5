"""`matpo keys new|show|allow`: the keys of encrypted links."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from matpo.errors import UserError
from protocols.channel import new_keys
from protocols.keys import ActorKeys, BadKeys, HubKeys, allow, allowed

Act = Callable[[argparse.Namespace], int]


def add_keys_commands(parser: argparse.ArgumentParser) -> None:
    """Add the three commands to `matpo keys`."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    texts = {
        "new": "make keys for a hub and its first actor",
        "show": "print the public keys of a directory",
        "allow": "let one more actor in (by its public key)",
    }
    for name, act in (("new", _new), ("show", _show), ("allow", _allow)):
        command = commands.add_parser(name, help=texts[name])
        command.add_argument("directory", type=Path)
        if name == "allow":
            command.add_argument("public", help="the actor's public key, as `matpo keys show` prints it there")
        command.set_defaults(act=_explained(act))


def _explained(act: Act) -> Act:
    """The same command, with a key problem told as one the user can fix."""

    def command(arguments: argparse.Namespace) -> int:
        try:
            return act(arguments)
        except BadKeys as error:
            raise UserError(str(error)) from error

    return command


def _new(arguments: argparse.Namespace) -> int:
    new_keys(arguments.directory)
    print(f"keys are in {arguments.directory}; hub: set hub.key_dir={arguments.directory}")
    print(f"actors: copy {arguments.directory / 'actor.key'} to the same directory there and set hub.key_dir likewise")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    print(f"actor  {ActorKeys.load(arguments.directory).pair.public}")
    if (arguments.directory / "hub.key").is_file():
        print(f"hub    {HubKeys.load(arguments.directory).pair.public}")
        for public in allowed(arguments.directory):
            print(f"allows {public}")
    return 0


def _allow(arguments: argparse.Namespace) -> int:
    allow(arguments.directory, arguments.public)
    print(f"{arguments.public} may come in; a running hub notices at once")
    return 0
