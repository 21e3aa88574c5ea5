"""Errors a user can fix. Entry points print them in one line and exit with 2 or 3; all else is a bug and crashes."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Final, TypeVar

from matpo.redaction import hide

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Numbers of the `OSError` of a full disk, a used-up quota, a file-size limit."""

USER_ERROR: Final = 2
PAUSED: Final = 3
"""Exit codes: of `UserError`, and of `Paused`."""

Kind = TypeVar("Kind", bound=Exception)


class UserError(Exception):
    """Names the thing, its value and the remedy, in one line."""


class Paused(UserError):
    """The run is saved and ends in order, on all ranks: it goes on only when somebody starts it again."""


def run_command(main: Callable[[], int]) -> int:
    """Run an entry point: a `UserError` becomes one line on stderr and its exit code. No secret is printed."""
    sys.excepthook = _print_hidden
    try:
        return main()
    except UserError as error:
        sys.stderr.write(f"error: {hide(str(error))}\n")
        return PAUSED if isinstance(error, Paused) else USER_ERROR
    except KeyboardInterrupt:
        return 130


def _print_hidden(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(hide("".join(traceback.format_exception(kind, error, trace))))


def first_error(group: BaseExceptionGroup[BaseException], *kinds: type[Kind]) -> Kind | None:
    """The first error of one of these kinds anywhere in a group: task groups raise groups of groups."""
    for error in group.exceptions:
        if isinstance(error, kinds):
            return error
        if isinstance(error, BaseExceptionGroup) and (inner := first_error(error, *kinds)) is not None:
            return inner
    return None
