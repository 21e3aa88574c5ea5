"""The sandboxes that work on this machine, for the tests of the code server."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio
import psutil
import pytest
from mcp import StdioServerParameters

from actors.tools import heir
from tool_servers.code.pool import Pool
from tool_servers.code.sandbox import TIERS, Allowance, SandboxError, Tier, choose_sandbox
from tool_servers.code.worker import Finished

ROOT = Path(__file__).parents[2]
SMALL = Allowance(memory_bytes=256 * 2**20, disk_bytes=4 * 2**20, output_bytes=10_000, longest_s=60)


def _works(tier: Tier) -> bool:
    try:
        choose_sandbox(Allowance(), tier=tier)
    except SandboxError:
        return False
    return True


HERE: list[Tier] = [tier for tier in TIERS if _works(tier)]
every_tier = pytest.mark.parametrize("tier", HERE)
LIBC = "import ctypes, os; libc = ctypes.CDLL(None, use_errno=True)"
"""How programs reach the C library."""


@asynccontextmanager
async def opened(tier: Tier) -> AsyncIterator[Pool]:
    """A small pool of a tier, for at most forty seconds."""
    pool = Pool(choose_sandbox(SMALL, tier=tier), ahead=0, at_once=4)
    with anyio.fail_after(40):
        async with pool.open():
            yield pool


async def run(pool: Pool, program: str, timeout_s: float = 10.0) -> Finished:
    """One program to its end."""
    return await pool.run(textwrap.dedent(program), timeout_s=timeout_s)


def children() -> list[psutil.Process]:
    """Every process that this one has started and that still is, but the one that stays for what other tests start."""
    return [child for child in psutil.Process().children(recursive=True) if not is_heir(child)]


def is_heir(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return heir.__file__ in process.cmdline()
    return False


def spawn_server(*options: str) -> StdioServerParameters:
    """The code server over stdio."""
    arguments = ["-m", "tool_servers.code", "serve", *options]
    return StdioServerParameters(command=sys.executable, args=arguments, cwd=ROOT, env=dict(os.environ))
