"""Errors a user can fix. Entry points print them in one line and exit with 2; everything else is a bug and crashes."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

from matpo.redaction import hide

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Numbers of the `OSError` of a full disk, a used-up quota, a file-size limit."""

Kind = TypeVar("Kind", bound=Exception)


class UserError(Exception):
    """Names the thing, its value and the remedy, in one line."""


def run_command(main: Callable[[], int]) -> int:
    """Run an entry point: a `UserError` becomes one line on stderr and exit code 2. No secret is printed."""
    sys.excepthook = _print_hidden
    try:
        return main()
    except UserError as error:
        sys.stderr.write(f"error: {hide(str(error))}\n")
        return 2
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
