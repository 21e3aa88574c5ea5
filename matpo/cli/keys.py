"""`matpo keys new|show|allow`: the keys of encrypted links."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from matpo.errors import UserError
from protocols.channel import new_actor_keys, new_keys
from protocols.keys import ActorKeys, BadKeys, HubKeys, allow, allowed

Act = Callable[[argparse.Namespace], int]


def add_keys_commands(parser: argparse.ArgumentParser) -> None:
    """Add the three commands to `matpo keys`."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    texts = {
        "new": "make keys for a hub and its first actor; with --hub: for one more actor, or a relay",
        "show": "print the public keys of a directory",
        "allow": "let one more actor in (by its public key)",
    }
    for name, act in (("new", _new), ("show", _show), ("allow", _allow)):
        command = commands.add_parser(name, help=texts[name])
        command.add_argument("directory", type=Path)
        if name == "new":
            command.add_argument("--hub", metavar="KEY", help="public key of the hub that the new key is for")
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
    folder = arguments.directory
    if arguments.hub is not None:
        public = new_actor_keys(folder, hub=arguments.hub)
        print(f"keys are in {folder}; actor: set hub.key_dir={folder}, relay: give --key-dir {folder}")
        print(f"where the hub is, run: matpo keys allow DIR '{public}'")
        return 0
    new_keys(folder)
    print(f"keys are in {folder}; hub: set hub.key_dir={folder}")
    print(f"first actor: copy {folder / 'actor.key'} to the same directory there and set hub.key_dir likewise")
    print(f"further actors: there, run: matpo keys new DIR --hub '{HubKeys.load(folder).pair.public}'")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    folder = arguments.directory
    there = {name for name in ("hub.key", "actor.key") if os.access(folder / name, os.F_OK)}
    if "hub.key" in there:
        print(f"hub    {HubKeys.load(folder).pair.public}  (its secret: {folder / 'hub.key'})")
    if there != {"hub.key"}:
        keys = ActorKeys.load(folder)
        print(f"actor  {keys.pair.public}  (its secret: {folder / 'actor.key'}) for the hub {keys.hub}")
    for public in allowed(folder):
        print(f"allows {public}")
    return 0


def _allow(arguments: argparse.Namespace) -> int:
    allow(arguments.directory, arguments.public)
    print(f"{arguments.public} may come in; a running hub notices at once")
    return 0
