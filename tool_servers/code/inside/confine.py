"""How a worker gives up its powers for good: mounts, identity, capabilities, files, limits, system calls."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
from typing import TypedDict

from tool_servers.code.inside.calls import seccomp_filter

SCRATCH = "/tmp"
"""Where a program may write."""
THREADS = 64
"""Per program, itself included."""
SCRATCH_FILES = 4_096
"""Files and folders a program may make."""
_NEEDS_COUNT_PER_NAMESPACE = (5, 14)

# linux/prctl.h, linux/mount.h, linux/capability.h, linux/sched.h, linux/landlock.h
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 1, 38, 22, 2
_MS_NOSUID_NODEV_NOEXEC = 0b1110
_CAPABILITY_VERSION_3 = 0x20080522
_CLONE_NEWUSER = 0x10000000
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_READ_FILE, _READ_FOLDER = 0b100, 0b1000
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
"""How many rights over files each ABI version rules; 16 since version 5."""


class Limits(TypedDict):
    """What one program may use, as the server passes it to its worker."""

    memory_bytes: int
    cpu_s: int
    file_bytes: int
    """Of all scratch files together."""
    open_files: int
    become: int | None
    """The user a worker started by root turns into, from inside its namespaces."""
    read: list[str]
    """Landlock tier: all that may be read; empty where namespaces already hide the rest."""
    packages: list[str]
    """Folders put on `sys.path`."""
    preload: list[str]
    """Modules imported ahead of the program."""


def confine(limits: Limits) -> None:
    """Give up everything a program does not need. Raises `OSError` naming the step that failed."""
    namespaces = not limits["read"]
    if namespaces:
        _mount_scratch(limits["file_bytes"])
        _become(limits["become"])
    _drop_capabilities()
    # A worker must not outlive its server, however that ends.
    _check(_libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl(PDEATHSIG)")
    _check(_libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(NO_NEW_PRIVS)")
    if not namespaces:
        _restrict_files(limits["read"])
    _limit(limits, namespaces=namespaces)
    _filter_calls(namespaces=namespaces)


def landlock_version() -> int:
    """The kernel's Landlock ABI version; 0 where there is none."""
    version: int = _libc().syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    return max(0, version)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _mount_scratch(most_bytes: int) -> None:
    """An empty file system in memory at `SCRATCH`: the only place to write to, of bounded size and number of files."""
    options = f"size={most_bytes},nr_inodes={SCRATCH_FILES},mode=1777"
    place = SCRATCH.encode()
    _check(_libc().mount(b"tmpfs", place, b"tmpfs", _MS_NOSUID_NODEV_NOEXEC, options.encode()), f"mount {SCRATCH}")
    os.chdir(SCRATCH)


def _become(user: int | None) -> None:
    """Turn from root into an ordinary user with a user namespace of its own, in which its threads are counted."""
    if user is None:
        return
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    _check(_libc().unshare(_CLONE_NEWUSER), "unshare(NEWUSER)")


def _drop_capabilities() -> None:
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0))
    _check(_libc().capset(header, ctypes.create_string_buffer(24)), "capset")


def _restrict_files(read: list[str]) -> None:
    """Reading beneath `read` is all that is left of the file system, and no other process can be signalled."""
    libc, version = _libc(), landlock_version()
    # Rights over files; over TCP since version 4; abstract sockets and signals to others since version 6.
    ruled = (1 << _FILE_RIGHTS.get(version, 16)) - 1, 0b11, 0b11
    size = 8 if version < 4 else 16 if version < 6 else 24
    attributes = ctypes.create_string_buffer(struct.pack("=QQQ", *ruled), 24)
    ruleset = _check(libc.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), 0), "landlock_create_ruleset")
    for path in read:
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rights = _READ_FILE | _READ_FOLDER if os.path.isdir(path) else _READ_FILE
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, beneath))
        _check(libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0), f"landlock_add_rule {path}")
        os.close(beneath)
    _check(libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def _limit(limits: Limits, *, namespaces: bool) -> None:
    """Set resource limits that the program cannot raise again."""
    ceilings = {
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_CPU: limits["cpu_s"],
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_CORE: 0,
    }
    # Older kernels count the threads of a user across all namespaces, and would count strangers in.
    if namespaces and tuple(int(part) for part in os.uname().release.split(".")[:2]) >= _NEEDS_COUNT_PER_NAMESPACE:
        ceilings[resource.RLIMIT_NPROC] = THREADS
    for what, most in ceilings.items():
        resource.setrlimit(what, (most, most))


def _filter_calls(*, namespaces: bool) -> None:
    """Install the filter for this process and all its threads; there is no way back."""
    program = seccomp_filter(os.uname().machine, os.getpid(), namespaces=namespaces)
    code = ctypes.create_string_buffer(program, len(program))
    descriptor = ctypes.create_string_buffer(struct.pack("@HxxxxxxP", len(program) // 8, ctypes.addressof(code)))
    _check(_libc().prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, descriptor, 0, 0), "prctl(SECCOMP)")
