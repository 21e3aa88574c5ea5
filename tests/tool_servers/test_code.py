"""The code server: programs run, and stay in."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from pydantic import JsonValue

from tests.tool_servers.using import use
from tool_servers.code.__main__ import report, run_python_tool
from tool_servers.code.sandbox import Allowance, Finished, Pool, SandboxError, Tier, choose_sandbox
from tool_servers.serving import BadCall

LINES = 10_000


def works(tier: Tier) -> bool:
    try:
        choose_sandbox(Allowance(), tier=tier, require_strict=False)
    except SandboxError:
        return False
    return True


TIERS: list[Tier] = [tier for tier in ("bubblewrap", "landlock") if works(tier)]


@pytest_asyncio.fixture(params=TIERS)
async def pool(request: pytest.FixtureRequest) -> AsyncIterator[Pool]:
    allowance = Allowance(memory_bytes=256 * 2**20, disk_bytes=4 * 2**20)
    pool = Pool(choose_sandbox(allowance, tier=request.param, require_strict=False), ahead=0, at_once=4)
    async with asyncio.timeout(40), pool.open():
        yield pool


async def run(pool: Pool, program: str, timeout_s: float = 10.0) -> Finished:
    return await pool.run(program, timeout_s=timeout_s, output_bytes=LINES)


def test_at_least_one_tier_confines_programs_here() -> None:
    assert TIERS != []


async def test_output_the_last_value_and_errors_come_back(pool: Pool) -> None:
    assert report(await run(pool, "x = 20\nprint('hi')\nx * 2 + 2")) == "hi\n42"
    assert report(await run(pool, "None")) == "(no output)"
    failed = await run(pool, "def f():\n    return 1 / 0\nf()")
    assert failed.reason == "exit 1"
    assert "    return 1 / 0" in failed.stderr
    assert "inside.py" not in failed.stderr
    assert (await run(pool, "import sys; sys.exit(3)")).reason == "exit 3"
    assert "SyntaxError" in (await run(pool, "def")).stderr
    assert (await run(pool, "import json, math, threading, decimal\nmath.comb(5, 2)")).stdout == "10\n"


REFUSED = ("PermissionError", "FileNotFoundError", "OSError", "BlockingIOError")


@pytest.mark.parametrize(
    "attempt",
    [
        "open('/etc/shadow').read()",
        "open('/etc/passwd').read()",
        f"open({str(Path(__file__).resolve())!r}).read()",
        "open('/proc/1/environ').read() and open('/proc/%d/environ' % __import__('os').getppid()).read() and 1/0",
        "open('/usr/escaped', 'w')",
        "open('/escaped', 'w')",
        "open('/dev/shm/escaped', 'w')",
        "import socket; socket.socket()",
        "import socket; socket.create_connection(('127.0.0.1', 22), 1)",
        "import urllib.request; urllib.request.urlopen('http://1.1.1.1', timeout=1)",
        "import os; os.fork()",
        "import os; os.posix_spawn('/bin/sh', ['sh'], {})",
        "import os; os.execv('/bin/sh', ['sh', '-c', 'id'])",
        "import subprocess; subprocess.run(['/bin/ls'])",
        "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
        "import os, signal; os.kill(-1, signal.SIGKILL)",
        "import resource; resource.prlimit(__import__('os').getppid(), resource.RLIMIT_CPU, (0, 0))",
        "import os; os.unshare(os.CLONE_NEWUSER) if hasattr(os, 'unshare') else open('/no')",
        "import os; os.chroot('/tmp')",
    ],
)
async def test_an_escape_is_refused_and_the_server_lives(pool: Pool, attempt: str) -> None:
    done = await run(pool, attempt)
    last = done.stderr.strip().splitlines()[-1]
    assert done.reason == "exit 1"
    # Inside a private process namespace /proc shows only the sandbox itself; reading that is no escape.
    assert last.startswith((*REFUSED, "urllib.error.URLError", "ZeroDivisionError")), last
    assert (await run(pool, "1")).stdout == "1\n"


async def test_nothing_of_the_servers_environment_is_inherited(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    done = await run(
        pool, "import os; print(sorted(os.environ)); print([f for f in range(3, 64) if os.path.exists(f)])"
    )
    assert "SECRET" not in done.stdout
    assert done.reason == "ok"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("bytearray(10**9)", "exit 1"),
        ("x = []\nwhile True: x.append(bytearray(10**6))", "exit 1"),
        ("import threading\nwhile True: threading.Thread(target=threading.Event().wait).start()", "exit 1"),
        ("while True: print('x' * 1000)", "output limit"),
        ("import os\nwhile True: os.write(2, b'x' * 65536)", "output limit"),
        ("open('big', 'wb').write(b'x' * 10**7)", "exit 1"),
        ("import ctypes; ctypes.string_at(0)", "killed by SIGSEGV"),
    ],
)
async def test_a_program_that_takes_too_much_ends_with_the_reason(pool: Pool, program: str, reason: str) -> None:
    done = await run(pool, program)
    assert done.reason.startswith(reason)
    assert len(done.stdout) + len(done.stderr) <= LINES


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)", "import signal\n"
                                     "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nsignal.pause()"])  # fmt: skip
async def test_a_program_that_does_not_end_is_killed_with_all_it_holds(pool: Pool, program: str) -> None:
    done = await run(pool, program, timeout_s=0.3)
    assert done.reason == "timeout: it ran longer than 0.3 s and was killed"
    assert done.seconds < 5


async def test_workers_are_used_once_and_started_ahead() -> None:
    sandbox = choose_sandbox(Allowance(), tier=None, require_strict=False)
    pool = Pool(sandbox, ahead=2, at_once=4)
    async with asyncio.timeout(30), pool.open():
        results = await asyncio.gather(*(pool.run(f"leak = {n}\n'leak' in globals() and {n}", timeout_s=10,
                                                  output_bytes=LINES) for n in range(8)))  # fmt: skip
        assert [done.stdout for done in results] == [f"{n}\n" if n else "0\n" for n in range(8)]
        again = await pool.run("leak", timeout_s=10, output_bytes=LINES)
        assert "NameError" in again.stderr


async def test_the_tool_checks_its_arguments_and_names_its_tier() -> None:
    sandbox = choose_sandbox(Allowance(), tier=None, require_strict=False)
    pool = Pool(sandbox, ahead=0, at_once=1)
    tool = run_python_tool(pool, sandbox.tier, timeout_s=5, longest_s=10, output_bytes=LINES)
    async with asyncio.timeout(30), pool.open():
        reply = await use(tool, {"code": "1 + 1"})
        assert (reply.text, reply.is_error) == ("2", False)
        assert reply.meta is not None
        assert reply.meta["sandbox"] == sandbox.tier
        wrong: list[dict[str, JsonValue]] = [{}, {"code": ""}, {"code": "1", "timeout_s": 11}]
        for bad in wrong:
            with pytest.raises(BadCall):
                await use(tool, bad)


def test_strict_refuses_the_weaker_tier() -> None:
    with pytest.raises(SandboxError, match="landlock: not strict"):
        choose_sandbox(Allowance(), tier="landlock", require_strict=True)


def test_no_sandbox_outlives_its_pool() -> None:
    sandbox = choose_sandbox(Allowance(), tier=None, require_strict=False)
    pool = Pool(sandbox, ahead=3, at_once=4)

    async def use() -> None:
        async with asyncio.timeout(30), pool.open():
            await pool.run("1", timeout_s=10, output_bytes=LINES)

    asyncio.run(use())
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    assert children.read_text().split() == []
