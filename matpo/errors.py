"""Errors a user can fix. Entry points print them in one line and exit with 2; everything else is a bug and crashes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

Kind = TypeVar("Kind", bound=Exception)


class UserError(Exception):
    """Names the thing, its value and the remedy, in one line."""


def run_command(main: Callable[[], int]) -> int:
    """Run an entry point: a `UserError` becomes one line on stderr and exit code 2."""
    try:
        return main()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130


def first_error(group: BaseExceptionGroup[BaseException], *kinds: type[Kind]) -> Kind | None:
    """The first error of one of these kinds anywhere in a group: task groups raise groups of groups."""
    for error in group.exceptions:
        if isinstance(error, kinds):
            return error
        if isinstance(error, BaseExceptionGroup) and (inner := first_error(error, *kinds)) is not None:
            return inner
    return None
