"""The escape suite of the code server: whatever a program tries, it stays in, and the next call is served.

Each attempt runs in every tier that works here as the user who runs the tests; the last test repeats all, and the other
files of the sandbox, as others.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import anyio
import pytest

from tests.tool_servers.sandboxes import LIBC, ROOT, every_tier, opened, run
from tool_servers.code.sandbox import Tier

REFUSED = ("PermissionError", "FileNotFoundError", "OSError", "ProcessLookupError", "URLError", "RuntimeError")
RAISE = "assert r == -1, r; raise OSError(ctypes.get_errno(), 'refused')"
SERVER = os.getpid()
READ_FILES = [
    "open('/etc/shadow').read()",
    "open('/etc/passwd').read()",
    f"open({str(Path(__file__).resolve())!r}).read()",
    f"import os; os.listdir({str(ROOT)!r})",
    "import os; os.listdir('/home')",
    f"import os; os.listdir({str(Path(anyio.__file__).parent)!r})",
    "import os; os.listdir('/sys')",
    "import os; os.listdir('/var/log')",
    "open('/proc/1/environ').read()",
    "open('/proc/self/mem', 'rb').read()",
    "open('/proc/kcore', 'rb').read()",
    f"open('/proc/{SERVER}/environ').read()",
    f"open('/proc/{SERVER}/mem', 'rb').read()",
    f"import os; os.listdir('/proc/{SERVER}/fd')",
    "open('/proc/self/root/etc/passwd').read()",
    "open('../../../../etc/passwd').read()",
    "import os; os.symlink('/etc/passwd', '/tmp/l'); open('/tmp/l').read()",
    "import os; os.link('/usr/lib/os-release', '/tmp/l')",
    "import os; os.chdir('/etc'); open('passwd').read()",
    "import os; os.open('passwd', os.O_RDONLY, dir_fd=os.open('/etc', os.O_RDONLY))",
    "import os; os.open('/etc', os.O_PATH) and open('/etc/passwd').read()",
    "open('/dev/mem', 'rb')",
    "open('/dev/vda', 'rb')",
]
WRITE_FILES = [
    "open('/escaped', 'w')",
    "open('/etc/escaped', 'w')",
    "open('/usr/lib/escaped', 'w')",
    "open('/dev/shm/escaped', 'w')",
    "open('/var/tmp/escaped', 'w')",
    f"open({str(ROOT / 'escaped')!r}, 'w')",
    "import os; open(os.__file__, 'a')",
    "import os; os.remove(os.__file__)",
    "import os; os.chmod(os.__file__, 0o777)",
    "import os; os.chown(os.__file__, 0, 0)",
    "import os; os.utime(os.__file__)",
    "import os; os.truncate(os.__file__, 0)",
    "import os; os.setxattr(os.__file__, 'user.escaped', b'1')",
    "import os; os.rename(os.__file__, os.__file__ + '.old')",
    "import os; os.mkfifo('/tmp/fifo')",
    "import os; os.mknod('/tmp/disk', 0o60600, os.makedev(8, 0))",
]
NETWORK = [
    "import socket; socket.socket()",
    "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "import socket; socket.socket(socket.AF_INET6)",
    "import socket; socket.socket(socket.AF_UNIX)",
    "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "import socket; a, b = socket.socketpair(); a.connect('/dev/log')",
    "import urllib.request; urllib.request.urlopen('http://1.1.1.1', timeout=1)",
    "import socket; socket.getaddrinfo('example.com', 80)",
]
PROCESSES = [
    "import os; os.fork()",
    "import os; os.forkpty()",
    "import os; os.posix_spawn('/bin/sh', ['sh'], {})",
    "import os; os.execv('/bin/sh', ['sh', '-c', 'id'])",
    "import os, sys; os.execv(sys.executable, ['python', '-c', '1'])",
    "import subprocess, sys; subprocess.run([sys.executable, '-c', '1'])",
    "import multiprocessing; multiprocessing.get_context('fork').Process(target=print).start()",
    "import os; os.setsid()",
    "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
    f"import os, signal; os.kill({SERVER}, signal.SIGKILL)",
    "import os, signal; os.kill(-1, signal.SIGKILL)",
    "import os, signal; os.kill(0, signal.SIGKILL)",
    "import os, signal; os.killpg(0, signal.SIGKILL)",
    f"import os; os.pidfd_open({SERVER})",
    f"import fcntl; fcntl.fcntl(0, fcntl.F_SETOWN, {SERVER})",
    "import fcntl; fcntl.fcntl(0, 10, 9)",
    f"import resource; resource.prlimit({SERVER}, resource.RLIMIT_CPU, (0, 0))",
    "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    f"import os; os.setpriority(os.PRIO_PROCESS, {SERVER}, 19)",
    f"import os; os.sched_setaffinity({SERVER}, {{0}})",
    f"{LIBC}; r = libc.ptrace(16, {SERVER}, None, None); {RAISE}",
    f"{LIBC}; r = libc.process_vm_readv({SERVER}, None, 0, None, 0, 0); {RAISE}",
    f"{LIBC}; r = libc.prctl(1, 0, 0, 0, 0); {RAISE}",
]
KERNEL = [
    "import os; os.chroot('/tmp')",
    "import os; os.setuid(0)",
    "import os; os.setgroups([0])",
    "import os; os.memfd_create('hidden')",
    "import os; os.nice(-5)",
    f"{LIBC}; r = libc.unshare(0x10000000); {RAISE}",
    f"{LIBC}; r = libc.setns(0, 0); {RAISE}",
    f"{LIBC}; r = libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None); {RAISE}",
    f"{LIBC}; r = libc.mount(None, b'/', None, 4096 | 32, None); {RAISE}",
    f"{LIBC}; r = libc.umount2(b'/tmp', 2); {RAISE}",
    f"{LIBC}; r = libc.shmget(0, 4096, 0o1600); {RAISE}",
    f"{LIBC}; r = libc.sethostname(b'x', 1); {RAISE}",
    f"{LIBC}; r = libc.clone(None, None, 0x10000011, None); {RAISE}",
    f"{LIBC}; r = libc.syscall(435, None, 0); {RAISE}",
    f"{LIBC}; r = libc.mlockall(3); {RAISE}",
    f"{LIBC}; r = libc.prctl(22, 0, 0, 0, 0); {RAISE}",
]


def marks() -> tuple[object, ...]:
    """What an attempt to write would change."""
    library = Path(os.__file__).stat()
    folders = ("/", "/etc", "/usr/lib", "/dev/shm", "/var/tmp", ROOT)
    made = [folder for folder in folders if Path(folder, "escaped").exists()]
    return library.st_mode, library.st_mtime_ns, library.st_ctime_ns, made


@every_tier
@pytest.mark.parametrize("attempts", [READ_FILES, WRITE_FILES, NETWORK, PROCESSES, KERNEL],
                         ids=["read", "write", "network", "processes", "kernel"])  # fmt: skip
async def test_every_attempt_is_refused(tier: Tier, attempts: list[str]) -> None:
    before = marks()
    async with opened(tier) as pool:
        for attempt in attempts:
            done = await run(pool, attempt)
            last = (done.stderr.strip().splitlines() or [""])[-1]
            assert done.reason == "exception", (attempt, done)
            assert last.split(":")[0].split(".")[-1] in (*REFUSED, "gaierror", "ValueError"), (attempt, done)
        assert (await run(pool, "1")).value == "1"
    assert marks() == before


@every_tier
async def test_services_of_this_machine_hear_nothing(tier: Tier, tmp_path: Path) -> None:
    knock = """
        import ctypes, socket, struct
        libc = ctypes.CDLL(None)
        for family, address in {targets}:
            for kind in (1, 2):
                fd = libc.socket(family, kind, 0)
                pair = (ctypes.c_int * 2)()
                libc.socketpair(1, kind, 0, pair)
                for end in (fd, *pair):
                    libc.connect(end, address, len(address))
                    libc.sendto(end, b"x", 1, 0, address, len(address))
    """
    with (
        socket.socket() as tcp,
        socket.socket(type=socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as named,
        socket.socket(socket.AF_UNIX) as hidden,
    ):
        tcp.bind(("127.0.0.1", 0))
        udp.bind(("127.0.0.1", 0))
        named.bind(str(tmp_path / "socket"))
        hidden.bind(f"\0escape-{SERVER}")
        tcp.listen()
        hidden.listen()
        unix = socket.AF_UNIX.to_bytes(2, sys.byteorder)
        targets = [(1, unix + os.fsencode(tmp_path / "socket")), (1, unix + f"\0escape-{SERVER}".encode())]
        for listener in (tcp, udp):
            port = listener.getsockname()[1].to_bytes(2, "big")
            targets.append((2, socket.AF_INET.to_bytes(2, sys.byteorder) + port + b"\x7f\0\0\1" + bytes(8)))
        async with opened(tier) as pool:
            assert (await run(pool, knock.format(targets=targets))).reason == "ok"
        for listener in (tcp, udp, named, hidden):
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept() if listener in (tcp, hidden) else listener.recv(1)


@every_tier
async def test_nothing_of_the_servers_environment_or_descriptors_is_inherited(
    tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    with tempfile.TemporaryFile() as held:
        os.set_inheritable(held.fileno(), True)
        async with opened(tier) as pool:
            done = await run(pool, "import os; sorted(os.environ), os.getcwd()")
            assert "SECRET" not in done.value + done.stdout
            opened_files = """
                import os, stat
                found = []
                for fd in range(64):
                    try: found.append(stat.S_IFMT(os.fstat(fd).st_mode))
                    except OSError: pass
                found == [stat.S_IFCHR] + 3 * [stat.S_IFIFO]
            """
            assert (await run(pool, opened_files)).value == "True"
            assert "hunter2" not in (await run(pool, "import os, sys; os.uname(), sys.argv, sys.orig_argv")).value


def _as_another_user(user: int) -> list[str]:
    """Run Python as an ordinary user, with an interpreter it may read wherever ours is (root only)."""
    package_paths = [str(ROOT), *(path for path in sys.path if path.endswith("site-packages"))]
    inside = (
        'mount --bind "$0" /mnt && exec setpriv --reuid "$1" --regid "$1" --clear-groups --inh-caps=-all'
        ' env -i PATH=/usr/bin:/bin LD_LIBRARY_PATH=/mnt/lib PYTHONPATH="$2" PYTHONDONTWRITEBYTECODE=1 "$3" "${@:4}"'
    )
    interpreter = f"/mnt/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    return ["unshare", "--mount", "--propagation", "private", "bash", "-c", inside,
            sys.base_prefix, str(user), ":".join(package_paths), interpreter]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_all_of_this_holds_for_an_ordinary_user_too(tmp_path_factory: pytest.TempPathFactory) -> None:
    if os.geteuid() != 0:
        pytest.skip("these tests run as an ordinary user already; only root can run them as others")
    command = _as_another_user(1234)
    reachable = subprocess.run([*command, "-c", "import tests"], cwd="/", capture_output=True, text=True, check=False)
    if reachable.returncode != 0:
        pytest.skip(f"no other user can run the tests here: {reachable.stderr.strip().splitlines()[-1]}")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:
        os.chown(scratch, 1234, 1234)
        files = ("test_code_escapes.py", "test_code_bombs.py", "test_code.py")
        tests = [str(Path(__file__).with_name(file)) for file in files]
        options = [
            "-p",
            "no:cacheprovider",
            "-k",
            "not ordinary_user",
            "--basetemp",
            f"{scratch}/t",
            "--rootdir",
            str(ROOT),
        ]
        done = subprocess.run(
            [*command, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), *options, *tests],
            cwd=scratch,
            capture_output=True,
            text=True,
            timeout=380,
            check=False,
        )
    assert done.returncode == 0, done.stdout[-4_000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
