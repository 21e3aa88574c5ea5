"""Errors a user can fix. Entry points print them in one line and exit with 2; everything else is a bug and crashes."""

from __future__ import annotations

import sys
from collections.abc import Callable


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
