"""Runs inside the sandbox: takes its own powers away for good, then reads one program from stdin and runs it.

Standard library only, and run by path, so that nothing else of ours has to be readable in there.
"""

from __future__ import annotations

import ast
import ctypes
import json
import linecache
import os
import platform
import resource
import struct
import sys
import traceback
import types
from typing import NamedTuple, TypedDict

FILE_NAME = "<code>"

# linux/prctl.h, linux/seccomp.h, linux/filter.h, linux/audit.h
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_CLONE_THREAD = 0x00010000
_X32_BIT = 0x40000000
_ARGUMENT_0, _NUMBER, _ARCHITECTURE = 16, 0, 4


class SystemCalls(NamedTuple):
    """The numbers the filter needs on one architecture."""

    audit: int
    clone: int
    clone3: int
    tgkill: int
    prlimit64: int
    refused: tuple[int, ...]


# System call numbers per architecture; a name an architecture lacks is left out.
_CALLS = {
    "x86_64": SystemCalls(
        audit=0xC000003E, clone=56, clone3=435, tgkill=234, prlimit64=302,
        refused=(
            57, 58,  # fork, vfork
            59, 322,  # execve, execveat
            41,  # socket
            62, 200, 129, 297, 424, 434, 438,  # kill, tkill, *sigqueueinfo, pidfd_*
            101, 310, 311, 312, 440,  # ptrace, process_vm_*, kcmp, process_madvise
            165, 166, 155, 161, 428, 429, 430, 431, 432, 433, 442,  # mount and its successors, pivot_root, chroot
            272, 308, 303, 304,  # unshare, setns, *_handle_at
            248, 249, 250, 321, 298, 323,  # keys, bpf, perf_event_open, userfaultfd
            425, 426, 427,  # io_uring
            246, 320, 175, 313, 176, 169, 167, 168, 163,  # kexec, modules, reboot, swap, acct
            141, 203, 256, 279, 173, 172,  # setpriority, affinity, migrate/move_pages, ioperm, iopl
        ),
    ),
    "aarch64": SystemCalls(
        audit=0xC00000B7, clone=220, clone3=435, tgkill=131, prlimit64=261,
        refused=(
            221, 281, 198, 129, 130, 138, 240, 424, 434, 438, 117, 270, 271, 272, 440, 40, 39, 41, 51, 428, 429, 430,
            431, 432, 433, 442, 97, 268, 264, 265, 217, 218, 219, 280, 241, 282, 425, 426, 427, 104, 294, 105, 273,
            106, 142, 224, 225, 89, 140, 122, 238, 239,
        ),
    ),
}  # fmt: skip

# linux/landlock.h: rights over files by ABI version.
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_READ = 0b1100  # read_file, read_dir
_EXECUTE = 0b1
_ALL_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
_NEWEST_FILES = (1 << 16) - 1


class Limits(TypedDict):
    """What the parent passes as the first argument, in JSON."""

    memory_bytes: int
    cpu_s: int
    file_bytes: int
    open_files: int
    read: list[str]
    """Landlock tier: paths that may be read; empty where namespaces already confine the program."""
    write: list[str]
    """Landlock tier: folders that may be written."""
    packages: list[str]
    """Folders put on `sys.path`."""


def landlock_version() -> int:
    """The kernel's Landlock ABI version; 0 where there is none."""
    version: int = ctypes.CDLL(None, use_errno=True).syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    return max(0, version)


def confine_files(read: list[str], write: list[str]) -> None:
    """Allow reading beneath `read` and everything beneath `write`; all other files are out of reach (Landlock)."""
    libc = ctypes.CDLL(None, use_errno=True)
    handled = _ALL_BY_ABI.get(landlock_version(), _NEWEST_FILES)
    attributes = ctypes.create_string_buffer(struct.pack("=Q", handled))
    ruleset = libc.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(8), 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    for rights, paths in ((_READ | _EXECUTE, read), (handled, write)):
        for path in paths:
            beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
            allowed = rights if os.path.isdir(path) else rights & 0b101
            rule = ctypes.create_string_buffer(struct.pack("=Qi", allowed & handled, beneath))
            if libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0) < 0:
                raise OSError(ctypes.get_errno(), f"landlock_add_rule {path}")
            os.close(beneath)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0) < 0:
        raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    os.close(ruleset)


def _instruction(code: int, yes: int, no: int, value: int) -> bytes:
    return struct.pack("=HBBI", code, yes, no, value)


def seccomp_filter(machine: str, pid: int) -> bytes:
    """A BPF program: threads but no processes, no sockets, no signals to others, no exotic kernel interfaces."""
    calls = _CALLS[machine]
    refuse, missing = _instruction(_RETURN, 0, 0, _ERRNO | _EPERM), _instruction(_RETURN, 0, 0, _ERRNO | _ENOSYS)
    allow, kill = _instruction(_RETURN, 0, 0, _ALLOW), _instruction(_RETURN, 0, 0, _KILL)
    first_argument = _instruction(_LOAD, 0, 0, _ARGUMENT_0)
    program = [
        _instruction(_LOAD, 0, 0, _ARCHITECTURE), _instruction(_JUMP_EQUAL, 1, 0, calls.audit), kill,
        _instruction(_LOAD, 0, 0, _NUMBER),
        _instruction(_JUMP_AT_LEAST, 0, 1, _X32_BIT), refuse,
        _instruction(_JUMP_EQUAL, 0, 1, calls.clone3), missing,
        _instruction(_JUMP_EQUAL, 0, 4, calls.clone), first_argument,
        _instruction(_JUMP_ANY_BIT, 0, 1, _CLONE_THREAD), allow, refuse,
        _instruction(_JUMP_EQUAL, 0, 4, calls.tgkill), first_argument,
        _instruction(_JUMP_EQUAL, 0, 1, pid), allow, refuse,
        _instruction(_JUMP_EQUAL, 0, 4, calls.prlimit64), first_argument,
        _instruction(_JUMP_EQUAL, 0, 1, 0), allow, refuse,
    ]  # fmt: skip
    for number in calls.refused:
        program += [_instruction(_JUMP_EQUAL, 0, 1, number), refuse]
    return b"".join([*program, allow])


def confine_calls() -> None:
    """Install the filter for this process and all its threads; there is no way back."""
    libc = ctypes.CDLL(None, use_errno=True)
    program = seccomp_filter(platform.machine(), os.getpid())
    code = ctypes.create_string_buffer(program, len(program))
    descriptor = struct.pack("@HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.create_string_buffer(descriptor), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_SECCOMP)")


def limit(limits: Limits) -> None:
    """Set resource limits that the program cannot raise again."""
    for what, most in (
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_CPU, limits["cpu_s"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


def run(source: str) -> int:
    """Run a program as `__main__`; prints the value of a final expression, or the traceback. Returns the exit code."""
    linecache.cache[FILE_NAME] = (len(source), None, source.splitlines(keepends=True), FILE_NAME)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    try:
        tree = ast.parse(source, FILE_NAME)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, FILE_NAME, "exec"), module.__dict__)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), FILE_NAME, "eval"), module.__dict__)
            if value is not None:
                sys.stdout.write(f"{value!r}\n")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:  # noqa: BLE001 - whatever the program raises is its result
        error.__traceback__ = _own_frames(error.__traceback__)
        traceback.print_exception(error)
        return 1
    return 0


def _own_frames(frames: types.TracebackType | None) -> types.TracebackType | None:
    """Without the frames of this file."""
    while frames is not None and frames.tb_frame.f_code.co_filename != FILE_NAME:
        frames = frames.tb_next
    return frames


def main() -> None:
    """Confine, say so with one line on stderr, wait for the program, run it, end."""
    limits: Limits = json.loads(sys.argv[1])
    sys.argv = [FILE_NAME]
    sys.path[:0] = limits["packages"]
    if limits["read"]:
        confine_files(limits["read"], limits["write"])
    limit(limits)
    confine_calls()
    os.write(2, b"ready\n")
    source = sys.stdin.buffer.read().decode()
    code = run(source)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
