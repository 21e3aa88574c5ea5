"""What the operating system must allow an actor: a request in flight is an open file."""

from __future__ import annotations

import resource

from matpo.errors import UserError

OTHER_FILES = 256
"""Pipes and connections to tool servers, the hub, files; beside one connection per request to the engine."""


def allow_open_files(live_episodes: int) -> None:
    """Raise the soft limit of open files to the hard one. Raises `UserError` where that is not enough for one request
    to the engine per live episode."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    needed = live_episodes + OTHER_FILES
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"actor.concurrency {live_episodes} needs {needed} open files, but this process may have {hard};"
            f" raise the limit (ulimit -Hn {needed}, or LimitNOFILE= of a service) or lower actor.concurrency"
        )
