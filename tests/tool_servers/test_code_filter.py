"""The list of allowed system calls, as the kernel's filter machine reads it, on both architectures."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import pytest

from tests.tool_servers.sandboxes import HERE, opened
from tool_servers.code.inside.calls import numbers, seccomp_filter
from tool_servers.code.sandbox import Tier

ALLOWED, KILLED, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
HEADERS = {"x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")}
PID = 7


def verdict(program: bytes, audit: int, number: int, *arguments: int) -> int:
    """What a seccomp filter says to one call: the five instructions ours is made of, by linux/filter.h."""
    padded = [argument % 2**64 for argument in arguments] + [0] * (6 - len(arguments))
    data = struct.pack("<IIQ6Q", number, audit, 0, *padded)
    at, register = 0, 0
    while True:
        code, yes, no, value = struct.unpack_from("=HBBI", program, at * 8)
        at += 1
        match code:
            case 0x20:
                (register,) = struct.unpack_from("<I", data, value)
            case 0x54:
                register &= value
            case 0x15:
                at += yes if register == value else no
            case 0x35:
                at += yes if register >= value else no
            case _:
                assert code == 0x06
                assert isinstance(value, int)
                return value


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("namespaces", [True, False])
def test_what_is_not_listed_fails_and_what_is_listed_does_not(machine: str, namespaces: bool) -> None:
    program = seccomp_filter(machine, PID, namespaces=namespaces)
    known = numbers(machine)
    checked = {"clone", "kill", "tgkill", "prlimit64", "prctl", "fcntl", "ioctl", "socketpair"}
    weaker = {"chmod", "fchmod", "fchmodat", "utime", "utimes", "futimesat", "utimensat", "clone"}
    plain = {number for name, number in known.items() if name not in checked and (namespaces or name not in weaker)}
    for number in range(1_024):
        said = verdict(program, AUDIT[machine], number, 99, 99, 99)
        expected = ALLOWED if number in plain else ENOSYS if number >= 424 else EPERM
        if number not in {known[name] for name in checked & known.keys()}:
            assert said == expected, number
    assert verdict(program, AUDIT[machine], 2**30 + known["read"]) == EPERM
    assert verdict(program, 0x40000003, known["read"]) == KILLED
    assert len(program) // 8 < 4_096


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_arguments_decide_where_a_call_could_reach_others(machine: str) -> None:
    program = seccomp_filter(machine, PID, namespaces=True)

    def allowed(name: str, *arguments: int) -> bool:
        return verdict(program, AUDIT[machine], numbers(machine)[name], *arguments) == ALLOWED

    thread, namespace = 0x3D0F00, 0x10000000
    assert allowed("clone", thread)
    assert not allowed("clone", 0x1200011)
    assert not allowed("clone", thread | namespace)
    assert allowed("kill", PID, 9)
    assert not any(allowed("kill", pid, 9) for pid in (0, 1, 8, -1, -PID))
    assert allowed("tgkill", PID, PID)
    assert not allowed("tgkill", 8, 8)
    assert allowed("prlimit64", 0)
    assert not allowed("prlimit64", 1)
    assert allowed("fcntl", 1, 3)
    assert not any(allowed("fcntl", 1, command) for command in (8, 10, 15, 1024, 1026, 1031))
    assert allowed("ioctl", 1, 0x5421)
    assert not any(allowed("ioctl", 1, request) for request in (0x5412, 0x8901, 0x5452, 0x5431))
    assert allowed("socketpair", 1, 0x80801)
    assert not any(allowed("socketpair", 1, kind) for kind in (2, 3, 5, 0x80802))
    assert allowed("prctl", 15)
    assert not any(allowed("prctl", option) for option in (1, 4, 22, 38))


def test_numbers_are_those_of_the_kernels_headers() -> None:
    header = HEADERS["x86_64"]
    if not header.is_file():
        pytest.skip(f"{header} is not installed")
    defined = {name: int(number) for name, number in re.findall(r"__NR_(\w+)\s+(\d+)", header.read_text())}
    assert {name: defined[name] for name in numbers("x86_64")} == numbers("x86_64")


@pytest.mark.parametrize("tier", HERE)
async def test_in_the_sandbox_every_other_call_fails(tier: Tier) -> None:
    """Each is tried for real with arguments that would be harmless, were it let through."""
    listed = sorted(numbers(os.uname().machine).values())
    program = f"""
        import ctypes, errno
        call = ctypes.CDLL(None, use_errno=True).syscall
        through = []
        for number in range(1024):
            # 335 and 336 are traps that the kernel itself puts into programs it traces; no filter is asked.
            if number not in {listed} and number not in (335, 336):
                done = call(number, -1, 0, 0, 0, 0, 0)
                if done != -1 or ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS):
                    through.append((number, done, ctypes.get_errno()))
        through
    """
    async with opened(tier) as pool:
        lines = "\n".join(line[8:] for line in program.splitlines())
        done = await pool.run(lines, timeout_s=10)
        assert (done.value, done.stderr) == ("[]", "")
