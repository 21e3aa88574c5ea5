"""Programs of the code server that take all they can get, lie about themselves or never end: nobody else is hurt."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import anyio
import anyio.lowlevel
import psutil
import pytest
from mcp import Client

from tests.tool_servers.sandboxes import LIBC, ROOT, SMALL, children, every_tier, opened, run, spawn_server
from tool_servers.code.sandbox import Tier

BOMBS = {
    "threads": "import threading\nwhile True: threading.Thread(target=threading.Event().wait, daemon=True).start()",
    "bare threads": f"""
        {LIBC}
        import mmap, threading
        threading.stack_size(32768)
        while True: threading.Thread(target=threading.Event().wait, daemon=True).start()
    """,
    "descriptors": "import os\nkept = []\nwhile True: kept.append(os.pipe())",
    "a big file": "f = open('/tmp/f', 'wb')\nwhile True: f.write(bytes(10**6))",
    "big files": "n = 0\nwhile True: n += 1; open(f'/tmp/{n}', 'wb').write(bytes(10**6))",
    "many files": "n = 0\nwhile True: n += 1; open(f'/tmp/{n}', 'w').close()",
    "deep folders": "import os; os.chdir('/tmp')\nwhile True: os.mkdir('d'); os.chdir('d')",
    "a sparse file": "f = open('/tmp/f', 'wb'); f.truncate(10**9)",
    "memory": "kept = []\nwhile True: kept.append(bytearray(10**6))",
    "mapped memory": "import mmap\nkept = []\nwhile True: kept.append(mmap.mmap(-1, 10**7))",
    "a big number": "10 ** 10 ** 10",
    "recursion": "def f(): f()\nf()",
    "deep text": "eval('(' * 10**6)",
    "deep objects": "x = []\nfor _ in range(10**6): x = [x]\nrepr(x)",
}


@pytest.mark.slow
@every_tier
@pytest.mark.parametrize("bomb", BOMBS)
async def test_a_bomb_hurts_nobody_else(tier: Tier, bomb: str) -> None:
    async with opened(tier) as pool:
        done = await run(pool, BOMBS[bomb], timeout_s=4)
        assert done.reason in ("exception", "memory", "timeout", "killed", "output"), done
        assert (await run(pool, "1")).value == "1"
    assert children() == []


@pytest.mark.slow
@every_tier
async def test_all_a_program_holds_is_bounded_by_what_it_may_use(tier: Tier) -> None:
    """Memory, threads and scratch files together, seen from outside while the program holds on to all it could get."""
    greedy = """
        import threading, time
        kept = []
        try:
            while True: kept.append(bytearray(10**6))
        except MemoryError: pass
        kept.pop()
        try:
            while True: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        except RuntimeError: pass
        time.sleep(60)
    """
    most = 0
    async with opened(tier) as pool, anyio.create_task_group() as calls:
        calls.start_soon(run, pool, greedy, 2.0)
        with anyio.move_on_after(1.5):
            while True:
                await anyio.lowlevel.checkpoint()
                held = [process.memory_info().rss for process in children() if process.is_running()]
                most = max(most, sum(held))
    assert 100 * 2**20 < most < SMALL.memory_bytes + 50 * 2**20


@pytest.mark.slow
@every_tier
@pytest.mark.parametrize("stream", [1, 2, "report"])
async def test_a_hundred_megabytes_of_output_are_cut(tier: Tier, stream: int | str) -> None:
    flood = f"""
        import os
        def is_open(fd):
            try: return os.write(fd, b'x') == 1
            except OSError: return False
        ends = [{stream!r}] if {stream!r} != 'report' else [fd for fd in range(3, 4096) if is_open(fd)]
        for _ in range(10_000):
            for fd in ends:
                os.write(fd, b'x' * 10_000)
    """
    async with opened(tier) as pool:
        done = await run(pool, flood)
        assert (done.reason, done.truncated) == ("output", stream != "report")
        assert len(done.stdout) + len(done.stderr) + len(done.value) <= SMALL.output_bytes
        assert (await run(pool, "1")).value == "1"


EVERYWHERE = """
import os
for fd in range(3, 4096):
    try: os.write(fd, FRAME.encode())
    except OSError: pass
"""
FORGERIES = {
    "on stdout": "print('ready\\n' + FRAME)",
    "on every descriptor": EVERYWHERE,
    "and gone": EVERYWHERE + "os._exit(9)",
    "closed": "import os; os.closerange(0, 64)",
    "nonsense": "FRAME = '\\n' + '[' * 20_000" + EVERYWHERE + "os._exit(0)",
    "broken runner": "import sys, os, json\nos.write = os._exit = json.dumps = sys.stdout = sys.stderr = None\n1/0",
    "own frames": "import sys\nframe = sys._getframe()\nwhile frame: frame.f_globals.clear(); frame = frame.f_back",
    "no modules": "import sys; sys.modules.clear(); 5",
    "exception that lies": "class E(BaseException):\n    def __str__(self): raise self\nraise E",
    "value that lies": "class V:\n    def __repr__(self): return 5\nV()",
    "value that never ends": "class V:\n    def __repr__(self):\n        while True: pass\nV()",
    "value that exits": "class V:\n    def __repr__(self): import os; os._exit(0)\nV()",
}


@pytest.mark.slow
@every_tier
@pytest.mark.parametrize("forgery", FORGERIES)
async def test_what_a_program_reports_about_itself_is_all_it_can_forge(tier: Tier, forgery: str) -> None:
    frame = '{"ending": "ok", "exit_code": 0, "value": "forged", "value_cut": false}'
    async with opened(tier) as pool:
        done = await run(pool, f"FRAME = {frame!r}\n{FORGERIES[forgery]}", timeout_s=2)
        assert done.reason in ("ok", "exception", "exit", "timeout", "killed")
        if forgery != "and gone":
            assert done.value in ("", "5")
        assert (await run(pool, "1")).value == "1"


@pytest.mark.slow
@every_tier
@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import signal\nfor s in {*range(1, 65)} - {9, 19, 32, 33}: signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass",
        "import os\ntry: os.setsid()\nexcept OSError: pass\nwhile True: pass",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "import threading\nthreading.Thread(target=threading.Event().wait).start() if 0 else threading.Event().wait()",
        "import re; re.match('(a+)+$', 'a' * 50 + 'b')",
        "import os; r, w = os.pipe(); os.read(r, 1)",
        "import sys\nsys.stdout.close(); sys.stderr.close()\nwhile True: pass",
    ],
)
async def test_a_program_that_does_not_end_is_killed(tier: Tier, program: str) -> None:
    async with opened(tier) as pool:
        done = await run(pool, program, timeout_s=0.5)
        assert (done.reason, done.detail) == ("timeout", "it ran longer than 0.5 s and was killed")
    assert children() == []


@every_tier
async def test_idle_cpu_hogs_of_many_threads_are_stopped_by_their_cpu_time(tier: Tier) -> None:
    async with opened(tier) as pool:
        done = await run(pool, "import resource; resource.getrlimit(resource.RLIMIT_CPU)", timeout_s=3)
        assert done.value == "(8, 8)"


@contextmanager
def server(tier: Tier) -> Iterator[subprocess.Popen[bytes]]:
    command = spawn_server("--tier", tier, "--ahead", "3", "--http", "0")
    argv = [command.command, *command.args]
    with subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow
@every_tier
async def test_a_server_that_is_killed_leaves_no_process_behind(tier: Tier) -> None:
    with anyio.fail_after(60), server(tier) as process:
        assert process.stderr is not None
        said = b""
        while b"http://" not in said:
            said = process.stderr.readline()
            assert said, "the server ended"
        async with Client(said.split()[-1].decode()) as client:
            assert (await client.call_tool("run_python", {"code": "1"})).structured_content is not None
            async with anyio.create_task_group() as calls:
                calls.start_soon(client.call_tool, "run_python", {"code": "while True: pass", "timeout_s": 50})
                with anyio.move_on_after(1.0):
                    await anyio.Event().wait()
                held = psutil.Process(process.pid).children(recursive=True)
                process.send_signal(signal.SIGKILL)
                calls.cancel_scope.cancel()
    assert len(held) >= 4 if tier == "landlock" else len(held) >= 8
    _, alive = psutil.wait_procs(held, timeout=20)
    assert alive == []
