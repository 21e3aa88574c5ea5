"""Which system calls a program may make: a list of what is allowed, as a seccomp filter; all others fail."""

from __future__ import annotations

import struct
from collections.abc import Sequence

# Name, number on x86_64, number on aarch64 ("-" where it does not exist), from the kernel's own headers.
_NUMBERS = (
    # Files: what can be reached at all is decided by mounts or Landlock.
    "read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, preadv 295 69, pwritev 296 70, "
    "preadv2 327 286, pwritev2 328 287, lseek 8 62, open 2 -, openat 257 56, openat2 437 437, close 3 57, "
    "close_range 436 436, creat 85 -, stat 4 -, fstat 5 80, lstat 6 -, newfstatat 262 79, statx 332 291, access 21 -, "
    "faccessat 269 48, faccessat2 439 439, readlink 89 -, readlinkat 267 78, getcwd 79 17, chdir 80 49, fchdir 81 50, "
    "getdents 78 -, getdents64 217 61, mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35, "
    "rename 82 -, renameat 264 38, renameat2 316 276, link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36, "
    "chmod 90 -, fchmod 91 52, fchmodat 268 53, umask 95 166, utime 132 -, utimes 235 -, futimesat 261 -, "
    "utimensat 280 88, truncate 76 45, ftruncate 77 46, fallocate 285 47, fadvise64 221 223, fsync 74 82, "
    "fdatasync 75 83, copy_file_range 326 285, sendfile 40 71, statfs 137 43, fstatfs 138 44, getxattr 191 8, "
    "lgetxattr 192 9, fgetxattr 193 10, listxattr 194 11, llistxattr 195 12, flistxattr 196 13, "
    # Memory.
    "mmap 9 222, munmap 11 215, mprotect 10 226, mremap 25 216, madvise 28 233, brk 12 214, msync 26 227, "
    "mincore 27 232, "
    # Descriptors, and waiting for them; a pair of connected sockets is what asyncio wakes itself up with.
    "dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -, pipe2 293 59, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, "
    "epoll_create 213 -, epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22, "
    "epoll_pwait2 441 441, eventfd2 290 19, sendto 44 206, recvfrom 45 207, shutdown 48 210, getsockopt 55 209, "
    "getsockname 51 204, getpeername 52 205, socketpair 53 199, fcntl 72 25, ioctl 16 29, "
    # Threads of this process, and its own signals.
    "clone 56 220, futex 202 98, set_robust_list 273 99, rseq 334 293, set_tid_address 218 96, membarrier 324 283, "
    "sched_yield 24 124, sched_getaffinity 204 123, getcpu 309 168, getpriority 140 141, rt_sigaction 13 134, "
    "rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigsuspend 130 133, "
    "rt_sigtimedwait 128 137, sigaltstack 131 132, pause 34 -, restart_syscall 219 128, kill 62 129, tgkill 234 131, "
    "wait4 61 260, waitid 247 95, arch_prctl 158 -, prctl 157 167, exit 60 93, exit_group 231 94, "
    # Time, and facts about this process and machine.
    "nanosleep 35 101, clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169, "
    "time 201 -, times 100 153, getitimer 36 102, setitimer 38 103, alarm 37 -, getpid 39 172, gettid 186 178, "
    "getppid 110 173, getpgrp 111 -, getpgid 121 155, getsid 124 156, getuid 102 174, geteuid 107 175, getgid 104 176, "
    "getegid 108 177, getresuid 118 148, getresgid 120 150, getgroups 115 158, getrlimit 97 163, setrlimit 160 164, "
    "prlimit64 302 261, getrusage 98 165, uname 63 160, sysinfo 99 179, getrandom 318 278"
)
_COLUMN = {"x86_64": 1, "aarch64": 2}
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# What Landlock does not rule (modes and times of any file of the same owner) or cannot count (threads).
_ONLY_IN_NAMESPACES = frozenset({"chmod", "fchmod", "fchmodat", "utime", "utimes", "futimesat", "utimensat", "clone"})

# linux/filter.h, linux/seccomp.h; offsets into struct seccomp_data of the low words of its fields (little endian).
_LOAD, _AND, _JUMP_EQUAL, _JUMP_AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_NUMBER, _ARCHITECTURE, _ARGUMENT = 0, 4, (16, 24, 32)
# Calls from here on are younger than the fallbacks that C libraries have for kernels without them.
_FIRST_WITH_FALLBACK = 424

_CLONE_THREAD, _CLONE_NAMESPACES = 0x00010000, 0x7E020000
_SOCK_TYPE, _SOCK_STREAM = 0xF, 1
# A dozen fcntl commands, without F_SETOWN and F_SETSIG, which send signals to other processes.
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, 0x802C542A)  # terminal? size? FION*, FIO*CLEX, TCGETS2
_PRCTL = (3, 15, 16, 0x53564D41)  # GET_DUMPABLE, SET_NAME, GET_NAME, SET_VMA

Step = tuple[int, int, int, int]


def numbers(machine: str) -> dict[str, int]:
    """The allowed calls of one architecture and their numbers."""
    rows = [row.split() for row in _NUMBERS.split(", ")]
    return {row[0]: int(row[_COLUMN[machine]]) for row in rows if row[_COLUMN[machine]] != "-"}


def seccomp_filter(machine: str, pid: int, *, namespaces: bool) -> bytes:
    """A BPF program for the process `pid`: a call is allowed if it is listed and its argument is among those allowed.

    Anything else fails with EPERM, or ENOSYS where C libraries then do without. Outside private `namespaces` threads
    and changes of files' modes are refused too.
    """
    arguments: dict[str, tuple[int, int, Sequence[int]]] = {
        # argument, mask, allowed values
        "clone": (0, _CLONE_THREAD | _CLONE_NAMESPACES, (_CLONE_THREAD,)),
        "kill": (0, 0xFFFFFFFF, (pid,)),
        "tgkill": (0, 0xFFFFFFFF, (pid,)),
        "prlimit64": (0, 0xFFFFFFFF, (0,)),
        "prctl": (0, 0xFFFFFFFF, _PRCTL),
        "fcntl": (1, 0xFFFFFFFF, _FCNTL),
        "ioctl": (1, 0xFFFFFFFF, _IOCTL),
        # Sockets of a stream pair stay connected to each other; datagram ones could be pointed elsewhere.
        "socketpair": (1, _SOCK_TYPE, (_SOCK_STREAM,)),
    }
    refuse = (_RETURN, 0, 0, _ERRNO | _EPERM)
    allow = (_RETURN, 0, 0, _ALLOW)
    program: list[Step] = [
        (_LOAD, 0, 0, _ARCHITECTURE), (_JUMP_EQUAL, 1, 0, _AUDIT[machine]), (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]  # fmt: skip
    for name, number in numbers(machine).items():
        if name in _ONLY_IN_NAMESPACES and not namespaces:
            continue
        if name not in arguments:
            program += [(_JUMP_EQUAL, 0, 1, number), allow]
            continue
        argument, mask, values = arguments[name]
        checks: list[Step] = [(_LOAD, 0, 0, _ARGUMENT[argument]), (_AND, 0, 0, mask)]
        for value in values:
            checks += [(_JUMP_EQUAL, 0, 1, value), allow]
        program += [(_JUMP_EQUAL, 0, len(checks) + 1, number), *checks, refuse]
    # Numbers of the x32 interface start at 2^30: refused, not missing.
    program += [(_JUMP_AT_LEAST, 2, 0, 1 << 30), (_JUMP_AT_LEAST, 0, 1, _FIRST_WITH_FALLBACK)]
    program += [(_RETURN, 0, 0, _ERRNO | _ENOSYS), refuse]
    return b"".join(struct.pack("=HBBI", *step) for step in program)
