"""Open files: as many as there may be, or a clear word before anything starts."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from actors.limits import OTHER_FILES, allow_open_files
from matpo.errors import UserError


def test_the_soft_limit_becomes_the_hard_one() -> None:
    """In a process of its own: limits cannot be raised again."""
    program = """
import resource
from actors.limits import allow_open_files
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 1024))
allow_open_files(700)
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout == "(1024, 1024)\n"


def test_more_episodes_than_files_are_refused_with_the_number_that_is_needed() -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit[1] == resource.RLIM_INFINITY:
        pytest.skip("this system has no limit")
    try:
        with pytest.raises(UserError, match=f"needs {limit[1] + OTHER_FILES} open files.*lower actor.concurrency"):
            allow_open_files(limit[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
