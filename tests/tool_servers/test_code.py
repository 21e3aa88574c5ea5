"""The code server: what comes back from a program, how it ended, and how calls share workers."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path

import anyio
import psutil
import pytest
from mcp import Client, MCPError
from pydantic import JsonValue

from tests.tool_servers.sandboxes import HERE, ROOT, SMALL, children, every_tier, opened, spawn_server
from tests.tool_servers.test_any_client import http_server
from tests.tool_servers.using import use
from tool_servers.code.__main__ import main, report, run_python_tool
from tool_servers.code.pool import Busy, Pool
from tool_servers.code.sandbox import Allowance, Sandbox, SandboxError, Tier, choose_sandbox
from tool_servers.code.worker import Finished, Worker
from tool_servers.serving import BadCall, Unavailable


async def run(pool: Pool, program: str, timeout_s: float = 10.0) -> Finished:
    return await pool.run(program, timeout_s=timeout_s)


def test_at_least_one_tier_confines_programs_here() -> None:
    assert HERE != []


@every_tier
async def test_output_the_last_value_and_errors_come_back(tier: Tier) -> None:
    async with opened(tier) as pool:
        done = await run(pool, "x = 20\nprint('hi')\nx * 2 + 2")
        assert (done.stdout, done.value, done.stderr, done.reason) == ("hi\n", "42", "", "ok")
        assert report(done) == "hi\n42"
        assert report(await run(pool, "None")) == "(no output)"
        assert (await run(pool, "x = 3")).value == ""
        failed = await run(pool, "def f():\n    return 1 / 0\nf()")
        assert failed.reason == "exception"
        assert "    return 1 / 0" in failed.stderr
        assert "worker.py" not in failed.stderr
        assert "SyntaxError" in (await run(pool, "def")).stderr
        assert (await run(pool, "import json, math, threading, decimal\nmath.comb(5, 2)")).value == "10"
        assert (await run(pool, "'\\ud800', '\u00e9\u4e2d'")).value == "('\\ud800', '\u00e9\u4e2d')"
        assert (await run(pool, "input()")).stderr.endswith("EOFError: EOF when reading a line\n")


@every_tier
async def test_an_exit_code_is_told_and_zero_is_well(tier: Tier) -> None:
    async with opened(tier) as pool:
        done = await run(pool, "import sys; sys.exit(3)")
        assert (done.reason, done.detail) == ("exit", "exit code 3")
        assert (await run(pool, "import sys; print(1); sys.exit()")).reason == "ok"
        said = await run(pool, "raise SystemExit('no such thing')")
        assert (said.reason, said.stderr) == ("exit", "no such thing\n")
        silent = await run(pool, "import os; os._exit(0)")
        assert (silent.reason, silent.detail) == ("exit", "exit code 0, without an end of its own")


@every_tier
@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("bytearray(10**9)", "memory"),
        ("x = []\nwhile True: x.append(bytearray(10**6))", "memory"),
        ("while True: print('x' * 1000)", "output"),
        ("while True: pass", "timeout"),
        ("import ctypes; ctypes.string_at(0)", "killed"),
    ],
)
async def test_a_program_that_takes_too_much_ends_with_the_reason(tier: Tier, program: str, reason: str) -> None:
    async with opened(tier) as pool:
        done = await run(pool, program, timeout_s=2)
        assert done.reason == reason
        assert done.detail in report(done)
        assert len(done.stdout) + len(done.stderr) + len(done.value) <= SMALL.output_bytes


@every_tier
async def test_a_long_value_is_cut_and_says_so(tier: Tier) -> None:
    async with opened(tier) as pool:
        done = await run(pool, "print('x' * 4_000)\n'y' * 10_000_000")
        assert (done.reason, done.truncated) == ("ok", True)
        assert len(done.stdout) + len(done.value) == SMALL.output_bytes
        assert report(done).endswith("\n[the output was too long and is cut]")


@every_tier
async def test_nothing_is_left_for_the_next_call(tier: Tier) -> None:
    async with opened(tier) as pool:
        await run(pool, "import builtins; builtins.leak = 1")
        path = f"/tmp/leak-of-{uuid.uuid4().hex}"
        await run(pool, f"open({path!r}, 'w').close()")
        assert (await run(pool, "leak")).reason == "exception"
        assert (await run(pool, f"import os; os.path.exists({path!r})")).value == "False"


async def test_packages_and_preloaded_modules_are_there_only_when_allowed() -> None:
    folder = str(Path(anyio.__file__).parents[1])
    with anyio.fail_after(40):
        for tier in HERE:
            allowance = Allowance(packages=(folder,), preload=("json", "idna"))
            pool = Pool(choose_sandbox(allowance, tier=tier), ahead=0, at_once=1)
            async with pool.open():
                assert (await run(pool, "import sys; 'idna' in sys.modules")).value == "True"
            with pytest.raises(SandboxError, match="No module named 'no_such_module'"):
                choose_sandbox(Allowance(preload=("no_such_module",)), tier=tier)


async def test_workers_are_started_ahead_used_once_and_replaced() -> None:
    pool = Pool(choose_sandbox(SMALL), ahead=2, at_once=4)
    results: list[str] = []

    async def call(number: int) -> None:
        results.append((await run(pool, f"leak = {number}\n'leak' in globals() and {number}")).value)

    with anyio.fail_after(40):
        async with pool.open():
            async with anyio.create_task_group() as calls:
                for number in range(8):
                    calls.start_soon(call, number)
            assert sorted(results) == [str(number) for number in range(8)]
            assert "NameError" in (await run(pool, "leak")).stderr
    assert children() == []


async def test_a_call_that_finds_no_free_worker_in_time_is_busy_and_the_next_one_runs() -> None:
    pool = Pool(choose_sandbox(SMALL), ahead=0, at_once=1, wait_s=0.2)
    with anyio.fail_after(40):
        async with pool.open(), anyio.create_task_group() as calls:
            calls.start_soon(run, pool, "while True: pass", 60.0)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(Busy, match=r"busy: 1 programs run and none ended within 0.2 s"):
                await run(pool, "1")
            calls.cancel_scope.cancel()
        async with pool.open():
            assert (await run(pool, "1")).value == "1"


async def test_under_load_every_call_is_answered_or_refused_in_time() -> None:
    pool = Pool(choose_sandbox(SMALL), ahead=1, at_once=2, wait_s=0.5)
    answers: list[str] = []

    async def call() -> None:
        try:
            answers.append((await run(pool, "import time; time.sleep(0.3)")).reason)
        except Busy:
            answers.append("busy")

    with anyio.fail_after(40):
        async with pool.open(), anyio.create_task_group() as calls:
            for _ in range(30):
                calls.start_soon(call)
    assert len(answers) == 30
    assert set(answers) == {"ok", "busy"}


async def test_a_cancelled_call_takes_its_worker_with_it() -> None:
    pool = Pool(choose_sandbox(SMALL), ahead=0, at_once=1)
    with anyio.fail_after(40):
        async with pool.open():
            with anyio.move_on_after(0.5) as limit:
                await run(pool, "while True: pass", timeout_s=30)
            assert limit.cancelled_caught
            assert children() == []
            assert (await run(pool, "1")).value == "1"


async def test_a_worker_killed_from_outside_costs_its_call_only() -> None:
    results: list[Finished] = []

    async def call(worker: Worker) -> None:
        results.append(await worker.run("while True: pass", timeout_s=30))

    with anyio.fail_after(40):
        worker = await Worker.start(choose_sandbox(SMALL))
        async with anyio.create_task_group() as calls:
            calls.start_soon(call, worker)
            await anyio.wait_all_tasks_blocked()
            for process in children():
                # A part may be gone already, with the part it belongs to.
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        assert (results[0].reason, results[0].detail) == ("killed", "it was killed by SIGKILL")


async def test_a_worker_killed_while_it_waits_costs_one_call_at_most() -> None:
    pool = Pool(choose_sandbox(SMALL), ahead=1, at_once=1)
    with anyio.fail_after(40):
        async with pool.open():
            await run(pool, "1")
            for process in children():
                # A part may be gone already, with the part it belongs to.
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            assert (await run(pool, "2")).reason in ("ok", "killed")
            assert [(await run(pool, "2")).value for _ in range(3)] == ["2", "2", "2"]


async def test_a_sandbox_that_cannot_start_is_the_error_of_that_call_only() -> None:
    broken = Pool(Sandbox("bubblewrap", SMALL, Path("/bin/false")), ahead=1, at_once=1)
    tool = run_python_tool(broken, Sandbox("bubblewrap", SMALL), timeout_s=5)
    with anyio.fail_after(20):
        async with broken.open():
            for _ in range(3):
                with pytest.raises(Unavailable, match="a sandbox did not start: it ended without a word"):
                    await use(tool, {"code": "1"})


async def test_the_tool_checks_its_arguments_and_names_its_tier() -> None:
    sandbox = choose_sandbox(Allowance(longest_s=10))
    pool = Pool(sandbox, ahead=0, at_once=1)
    tool = run_python_tool(pool, sandbox, timeout_s=5)
    with anyio.fail_after(40):
        async with pool.open():
            reply = await use(tool, {"code": "print('a')\n1 + 1"})
            assert (reply.text, reply.is_error) == ("a\n2", False)
            assert reply.meta is not None
            assert reply.meta["sandbox"] == sandbox.tier
            assert reply.structured == {
                "reason": "ok", "detail": "", "stdout": "a\n", "stderr": "", "value": "2", "truncated": False,
            }  # fmt: skip
            assert (await use(tool, {"code": "1/0"})).is_error
            wrong: list[dict[str, JsonValue]] = [{}, {"code": ""}, {"code": "1", "timeout_s": 11}]
            wrong.append({"code": "1" * 1_000_001})
            for bad in wrong:
                with pytest.raises(BadCall):
                    await use(tool, bad)


async def test_packages_installed_where_programs_have_their_own_files_can_be_imported_all_the_same() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, anyio.fail_after(40):
        (Path(folder) / "installed.py").write_text("WORD = 'found'\n")
        os.chmod(folder, 0o755)
        for tier in HERE:
            pool = Pool(choose_sandbox(Allowance(packages=(folder,)), tier=tier), ahead=0, at_once=1)
            async with pool.open():
                assert (await run(pool, "import installed; installed.WORD")).value == "'found'"


def test_strict_refuses_the_weaker_tier() -> None:
    with pytest.raises(SandboxError, match="landlock: refused, it is not strict"):
        choose_sandbox(Allowance(), tier="landlock", require_strict=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--timeout", "0"], "--timeout 0.0: must be above 0"),
        (["--ahead", "-1"], "--ahead -1: must not be negative"),
        (["--timeout", "20", "--max-timeout", "10"], "--timeout 20 is above --max-timeout 10"),
        (["--tier", "landlock", "--require-strict"], "landlock: refused, it is not strict"),
    ],
)
def test_bad_options_are_one_line(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["serve", *options])
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert words in said
    assert said.count("\n") == 1


WITHOUT_NAMESPACES = """
import ctypes, os, struct, sys
step = lambda *parts: struct.pack("=HBBI", *parts)
load, equal, any_bit, end, allow, refuse = 0x20, 0x15, 0x45, 0x06, 0x7FFF0000, 0x00050001
clone, clone3, unshare, mount = {"x86_64": (56, 435, 272, 165), "aarch64": (220, 435, 97, 40)}[os.uname().machine]
program = step(load, 0, 0, 0)
program += step(equal, 0, 1, unshare) + step(end, 0, 0, refuse) + step(equal, 0, 1, mount) + step(end, 0, 0, refuse)
program += step(equal, 0, 1, clone3) + step(end, 0, 0, 0x00050026) + step(equal, 0, 3, clone) + step(load, 0, 0, 16)
program += step(any_bit, 0, 1, 0x7E020000) + step(end, 0, 0, refuse) + step(end, 0, 0, allow)
code = ctypes.create_string_buffer(program, len(program))
libc = ctypes.CDLL(None)
libc.prctl(38, 1, 0, 0, 0)
descriptor = ctypes.create_string_buffer(struct.pack("@HxxxxxxP", len(program) // 8, ctypes.addressof(code)))
assert libc.prctl(22, 2, descriptor, 0, 0) == 0
os.execv(sys.executable, [sys.executable, "-m", "tool_servers.code", *sys.argv[1:]])
"""


@pytest.mark.skipif("landlock" not in HERE, reason="the kernel has no Landlock")
def test_where_namespaces_are_forbidden_the_weaker_tier_works_and_strict_refuses_it() -> None:
    """Forbidden as container runtimes do it: with a filter on system calls."""

    def code(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", WITHOUT_NAMESPACES, *options]
        return subprocess.run(command, cwd=ROOT, input="", capture_output=True, text=True, timeout=60, check=False)

    checked = code("check").stdout.splitlines()
    assert "works" not in checked[0]
    assert checked[1].startswith("landlock: works")
    served = code("serve")
    assert served.returncode == 0
    assert served.stderr.startswith("code: sandbox tier landlock: ")
    assert "(not stronger, for bubblewrap: " in served.stderr
    strict = code("serve", "--require-strict")
    assert strict.returncode == 2
    assert strict.stderr.startswith("error: programs cannot be confined here: bubblewrap: ")
    assert strict.stderr.endswith("; landlock: refused, it is not strict\n")


def test_check_says_what_works_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["bubblewrap", "landlock"]
    assert [line.split(":")[0] for line in lines if "works" in line] == HERE


async def test_a_busy_server_fails_the_call_for_any_client_and_a_cancelled_call_frees_it() -> None:
    server = spawn_server("--at-once", "1", "--wait", "0.3", "--ahead", "0")
    with anyio.fail_after(60):
        async with Client(server) as client:
            assert (await client.call_tool("run_python", {"code": "1"})).structured_content is not None
            async with anyio.create_task_group() as calls:
                calls.start_soon(client.call_tool, "run_python", {"code": "while True: pass", "timeout_s": 50})
                # The first of the two in line gets the worker.
                await anyio.wait_all_tasks_blocked()
                with pytest.raises(MCPError, match=r"busy: 1 programs run and none ended within 0.3 s"):
                    await client.call_tool("run_python", {"code": "1"})
                calls.cancel_scope.cancel()
            done = await client.call_tool("run_python", {"code": "6 * 7"})
            assert done.structured_content is not None
            assert done.structured_content["value"] == "42"
            processes = children()
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert alive == []


async def test_a_client_that_hangs_up_over_http_takes_its_program_with_it() -> None:
    options = ("tool_servers.code", "serve", "--http", "0", "--at-once", "1", "--wait", "5", "--ahead", "0")
    with http_server(*options) as (url, _), anyio.fail_after(60):
        async with Client(url) as client:
            await client.call_tool("run_python", {"code": "1"})
            with anyio.move_on_after(1.0) as limit:
                await client.call_tool("run_python", {"code": "while True: pass", "timeout_s": 50})
            assert limit.cancelled_caught
            done = await client.call_tool("run_python", {"code": "6 * 7"})
            assert done.structured_content is not None
            assert done.structured_content["value"] == "42"
